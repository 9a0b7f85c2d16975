"""Bytes of the collectives that a process calls, by kind."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

NAMESPACES = ("c10d", "_c10d_functional", "c10d_functional", "_c10d_functional_autograd")
# By the beginning of an operator's name, the first that fits.
KINDS = {
    "broadcast": "broadcast",
    "allreduce": "all_reduce",
    "all_reduce": "all_reduce",
    "allgather": "all_gather",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "reduce": "reduce",
    "scatter": "scatter",
    "gather": "gather",
    "alltoall": "all_to_all",
    "all_to_all": "all_to_all",
    "send": "send",
    "recv": "recv",
}
SILENT = ("barrier", "monitored_barrier", "wait_tensor", "wrap_tensor")


class Traffic(TorchDispatchMode):
    """Counts while it is entered; what PyTorch's C++ calls, as DDP's reducer does, passes here as well.

    Counted is the whole tensor that a collective is about: what all_gather puts together, what reduce_scatter adds up.
    How many bytes a link carries for it is the backend's choice.

    Attributes:
        bytes: by kind, since the last `take`.
    """

    def __init__(self) -> None:
        """Nothing is counted yet."""
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def take(self) -> dict[str, int]:
        """What was counted; counting starts anew."""
        found, self.bytes = dict(self.bytes), Counter()
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace not in NAMESPACES:
            if any(issubclass(kind, DTensor) for kind in types):
                return NotImplemented  # it goes first, and the collectives that it calls come here
            return func(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2].lstrip("_")
        if not name.startswith(SILENT):
            kind = next((KINDS[start] for start in KINDS if name.startswith(start)), None)
            if kind is None:
                raise NotImplementedError(f"{func} is a collective that is not in KINDS: say which kind it is.")
            self.bytes[kind] += max(map(_bytes, (*args, result)))
        return result


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor))
