"""Shards: what a rank holds of a drawn tensor. Engines cut them from a weight that is not in memory: each is drawn."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map_only

from .virtual_weight import HANDLERS, VirtualWeight

aten = torch.ops.aten


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether ranks have parts of it."""
    if not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor  # takes a second to import, and is there once anything is sharded

    return isinstance(tensor, DTensor)


def local_part(tensor: Any) -> tuple[torch.Tensor, tuple[int, ...] | None]:
    """What this rank has of a tensor, and the index in the whole of its first element; None where it has the whole."""
    if not is_sharded(tensor):
        return tensor, None
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    local = tensor.to_local()
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return local, tuple(offset)


def shards_follow() -> bool:
    """Whether FSDP will cut this process's models into shards: as `accelerate launch` and TrainingArguments say."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "FSDP_CPU_RAM_EFFICIENT_LOADING" in os.environ


class DrawnPart(torch.Tensor):
    """A part of a weight that is not in memory: an engine copies it to where its shard is, and there it is drawn.

    Attributes:
        weight: of which it is a part.
        offset: the index there of its first element.
    """

    weight: VirtualWeight
    offset: tuple[int, ...]

    @staticmethod
    def __new__(
        cls: type[DrawnPart], weight: VirtualWeight, offset: tuple[int, ...], shape: tuple[int, ...]
    ) -> DrawnPart:
        """See the attributes."""
        part: DrawnPart = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=weight.dtype, device=weight.device)
        part.weight, part.offset = weight, offset
        return part

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def dense(self) -> torch.Tensor:
        """The values as an ordinary tensor."""
        drawn, *casts = self.weight.casts
        values = self.weight.scaffold.draw_part(self.offset, self.shape, drawn, self.device)
        for dtype in casts:
            values = values.to(dtype)
        return values

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map_only(DrawnPart, DrawnPart.dense, (args, kwargs or {}))
        return func(*args, **kwargs)


def _split(weight: VirtualWeight, size: int, dim: int = 0) -> Any:
    if weight.transposed or weight.words is not None or weight.codes is not None:
        return NotImplemented
    dim %= weight.dim()
    parts = []
    for first in range(0, weight.shape[dim], size):
        offset = tuple(first if at == dim else 0 for at in range(weight.dim()))
        shape = tuple(min(size, n - first) if at == dim else n for at, n in enumerate(weight.shape))
        parts.append(DrawnPart(weight, offset, shape))
    return parts


def _new_zeros(weight: VirtualWeight, *args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.empty(0, dtype=weight.dtype, device=weight.device).new_zeros(*args, **kwargs)


HANDLERS.update({aten.split: _split, aten.new_zeros: _new_zeros})
