"""A batch whose rows belong to different adapters: which rows are whose, and one tensor of what each has computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import torch


class RowAdapters(list[str]):
    """The adapter of each row of a batch, in order; `"__base__"` stands for none, as in PEFT."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(names)
        self._places: dict[torch.device, tuple[dict[str, torch.Tensor], torch.Tensor]] = {}

    @classmethod
    def of(cls, names: Sequence[str]) -> Self:
        """The same names; with what is known of them, if they are ones already."""
        return names if isinstance(names, cls) else cls(names)

    def apart(self, compute: Callable[[str, torch.Tensor], torch.Tensor], device: torch.device) -> torch.Tensor:
        """`compute(name, rows)` once for each adapter, where `rows` are the indices of its rows, shape `(n,)`.

        Returns:
            The results, in the order of the batch.
        """
        if device not in self._places:
            rows = {name: [i for i, wanted in enumerate(self) if wanted == name] for name in dict.fromkeys(self)}
            order = torch.tensor([i for mine in rows.values() for i in mine]).argsort().to(device)
            self._places[device] = {name: torch.tensor(mine, device=device) for name, mine in rows.items()}, order
        places, order = self._places[device]
        return torch.cat([compute(name, rows) for name, rows in places.items()])[order]
