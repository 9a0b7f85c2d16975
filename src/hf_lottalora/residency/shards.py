"""Shards: what a rank holds of a drawn tensor. Engines cut them from a weight that is not in memory: each is drawn."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from .partitions import is_partitioned, own_run
from .virtual_weight import HANDLERS, VirtualWeight

aten = torch.ops.aten


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether ranks have parts of it."""
    module = sys.modules.get("torch.distributed.tensor")  # takes a second to import, and is there once anything is
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Any) -> tuple[torch.Tensor, tuple[int, ...] | None]:
    """What this rank has of a tensor, and where that begins: None where it has the whole.

    Of an array's part that is an index for each dimension; of a run of the flattened array one.
    """
    if is_partitioned(tensor):
        return own_run(tensor)
    if not is_sharded(tensor):
        return tensor.detach(), None
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    local = tensor.detach().to_local()
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

    def dense(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """The values as an ordinary tensor, in `out` if it is given; see `fits`."""
        drawn, *casts = self.weight.casts
        values = self.weight.scaffold.draw_part(self.offset, self.shape, drawn, self.device, out)
        for dtype in casts:
            values = values.to(dtype)
        return values

    def fits(self, out: torch.Tensor) -> bool:
        """Whether it can be drawn there.

        Values that are drawn elsewhere and copied leave holes between the shards, in which no later ones have room: the
        C library's heap then grows to twice their size.
        """
        same = out.shape == self.shape and out.device == self.device and (out.dtype,) == self.weight.casts
        return same and type(out) is torch.Tensor and out.is_contiguous()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is aten.copy_.default and isinstance(args[1], DrawnPart) and args[1].fits(args[0]):
            return args[1].dense(out=args[0])
        args, kwargs = tree_map_only(DrawnPart, DrawnPart.dense, (args, kwargs or {}))
        return func(*args, **kwargs)


class RunsOf:
    """A weight that is not in memory, as DeepSpeed reads a tensor that it cuts: the run that it takes is drawn.

    Attributes:
        weight: the whole.
    """

    def __init__(self, weight: VirtualWeight) -> None:
        self.weight = weight

    def view(self, *_: int) -> RunsOf:
        """It is flat already."""
        return self

    def narrow(self, _: int, start: int, length: int) -> DrawnPart:
        """Elements `[start, start + length)`, shape `(length,)`."""
        return DrawnPart(self.weight, (start,), (length,))


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
