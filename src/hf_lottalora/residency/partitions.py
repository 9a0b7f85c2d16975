"""DeepSpeed's ZeRO-3: of each parameter a rank has a run of the flattened tensor, `ds_tensor`, and `data` is empty."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from transformers.integrations import is_deepspeed_zero3_enabled


def is_partitioned(tensor: Any) -> bool:
    """Whether ranks have runs of it."""
    return hasattr(tensor, "ds_tensor")


def whole_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """Its shape, also where it is partitioned."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def own_run(tensor: Any) -> tuple[torch.Tensor, tuple[int]]:
    """What this rank has of a partitioned tensor, without what fills the last one up, and where it starts."""
    size = tensor.ds_tensor.ds_numel
    start = min(size * dist.get_rank(tensor.ds_process_group), tensor.ds_numel)
    return tensor.ds_tensor.detach()[: min(size, tensor.ds_numel - start)], (start,)


def partitions_follow() -> bool:
    """Whether ZeRO-3 will cut this process's models: as `accelerate launch` and TrainingArguments say."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return False
    launched = os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
    return is_deepspeed_zero3_enabled() or (launched and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3")


@contextmanager
def gathered(tensors: Iterable[Any]) -> Iterator[None]:
    """Within it these are whole. A collective where one is partitioned: every rank must enter it."""
    found = [tensor for tensor in tensors if is_partitioned(tensor)]
    if not found:
        yield
        return
    from deepspeed import zero  # not a dependency; whoever has partitioned a tensor has it

    with zero.GatheredParameters(found):
        yield
