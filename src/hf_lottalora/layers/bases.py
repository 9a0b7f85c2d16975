"""Random bases that adapters are made of: drawn by index, so that none is saved, registered or sent.

A basis is a virtual matrix `(2**20, 2**20)` of unit variance, of which a layer takes the first rows and columns. An
element depends on seed, name, row and column alone: not on the sizes of other layers, nor on which layers are adapted.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

import torch
from torch._subclasses.fake_tensor import FakeTensor

from ..scaffold.tensor import ScaffoldTensor

SIDE = 1 << 20  # rows and columns of a basis; no layer is as large


class Basis:
    """One basis. On each device, in each dtype, the largest part that layers have asked for is held, for all of them.

    It is no buffer and no parameter, and a copy of a model shares it.
    """

    def __init__(self, spec: ScaffoldTensor) -> None:
        self.spec = spec
        self.rows = self.columns = 0
        self._held: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}

    def reserve(self, rows: int, columns: int) -> None:
        """Have a part of this size drawn at once when it is first needed, instead of one that grows."""
        self.rows, self.columns = max(self.rows, rows), max(self.columns, columns)

    def corner(self, rows: int, columns: int, dtype: torch.dtype, like: torch.Tensor) -> torch.Tensor:
        """Its first rows and columns where `like` is, shape `(rows, columns)`: a view, to be read only."""
        if without_values(like):
            return like.new_empty(rows, columns, dtype=dtype)
        held = self._held.get((like.device, dtype))
        if held is None or held.shape[0] < rows or held.shape[1] < columns:
            self.reserve(rows, columns)
            held = self._draw(dtype, like.device)
        return held[:rows, :columns]

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # would trace NumPy's drawing
    def _draw(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        with torch.inference_mode(False):  # else what is held could not be saved for a backward pass
            held = torch.empty(self.rows, self.columns, dtype=dtype, device=device)
            self.spec.fill([row * SIDE for row in range(self.rows)], held)
        self._held[device, dtype] = held
        return held

    def __deepcopy__(self, memo: Any) -> Basis:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return basis, (self.spec.name, self.spec.seed, self.spec.family)


_known: WeakValueDictionary[tuple[str, int, str], Basis] = WeakValueDictionary()


def basis(name: str, seed: int, family: str) -> Basis:
    """The basis of this name, seed and family: one object, as long as anyone uses it."""
    key = name, seed, family
    found = _known.get(key)
    if found is None:
        found = _known[key] = Basis(ScaffoldTensor(name, (SIDE, SIDE), seed, family))
    return found


def without_values(tensor: torch.Tensor) -> bool:
    """Whether there is nothing to compute with: on the meta device, or where only shapes are followed."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)
