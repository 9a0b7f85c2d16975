"""A base model that was built under DeepSpeed's `zero.Init`, whose parameters are empty: planned as a whole one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..paths import clean_modules, owner_of
from ..plan.plan import Plan
from ..residency.partitions import gathered, is_partitioned


class StandIns:
    """What is in the place of the partitioned parameters of a model: of matrices the shape, of the rest the values."""

    def __init__(self, model: nn.Module) -> None:
        self.places: dict[int, list[tuple[nn.Module, str]]] = {}
        self.parts: dict[int, Any] = {}
        for _, module in clean_modules(model):
            for attribute, parameter in module._parameters.items():
                if is_partitioned(parameter):
                    self.parts[id(parameter)] = parameter
                    self.places.setdefault(id(parameter), []).append((module, attribute))
        for key, part in self.parts.items():
            if len(part.ds_shape) < 2:
                self._put(key, _whole(part))
            else:
                like = torch.empty(part.ds_shape, dtype=part.dtype, device="meta")
                self._put(key, nn.Parameter(like, requires_grad=part.requires_grad))

    def _put(self, key: int, parameter: nn.Parameter) -> None:
        for module, attribute in self.places[key]:
            module._parameters[attribute] = parameter

    def settle(self, model: nn.Module, plan: Plan, use_dora: bool) -> None:
        """Of what is not drawn, matrices that stay frozen are the model's own, partitioned; trained ones are whole.

        Raises:
            ValueError: DoRA needs the norms of a matrix that stays partitioned.
        """
        at = {place: key for key, places in self.places.items() for place in places}
        for tensor in plan.tensors:
            key = at.get(owner_of(model, tensor.path))
            if key is None or tensor.base is not None or len(tensor.survey.shape) < 2:
                continue
            if use_dora and any(adapter.weight == tensor.path for adapter in plan.adapters):
                raise ValueError(
                    f"use_dora needs the norms of {tensor.path!r}, of which each rank has a part. Build the base model "
                    "before TrainingArguments or Accelerator, or set zero3_init_flag: false, so that it is whole."
                )
            self._put(key, _whole(self.parts[key]) if tensor.role == "trained" else self.parts[key])

    def remove(self) -> None:
        """All parameters are the model's own again."""
        for key, part in self.parts.items():
            self._put(key, part)


def _whole(part: Any) -> nn.Parameter:
    with gathered([part]):
        return nn.Parameter(part.detach().clone(), requires_grad=part.requires_grad)


@contextmanager
def stand_ins(model: nn.Module) -> Iterator[StandIns]:
    """Put them in place, and remove them if planning fails. Where there are any, every rank must do so together."""
    found = StandIns(model)
    try:
        yield found
    except BaseException:
        found.remove()
        raise
