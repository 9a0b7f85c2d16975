"""How much memory a model's weights take in each residency of its scaffold."""

from __future__ import annotations

import math

from torch import nn

from ..plan.plan import Plan, PlannedTensor
from ..residency.forms import check_residency
from ..residency.int4 import fits_kernel
from ..scaffold.families import get_family
from ..scaffold.tensor import ScaffoldTensor
from ..tuner.base_model import can_be_virtual

_FORMS = ("dense", "packed", "int4", "streamed")


def resident_bytes(model: nn.Module, plan: Plan) -> dict[str, int | None]:
    """Bytes of all weights at rest by residency: scaffold, trained and kept tensors, and adapters.

    Args:
        model: that the plan is of, with or without values.
        plan: of its adapter.

    Returns:
        None where the scaffold's families cannot be held so.
    """
    adapters = sum(adapter.numel for adapter in plan.adapters) * plan.adapter_dtype().itemsize
    found: dict[str, int | None] = {}
    for form in _FORMS:
        try:
            check_residency(form, {spec.family for spec in plan.scaffold.values()})
        except ValueError:
            found[form] = None
        else:
            found[form] = adapters + sum(_held(model, tensor, form) for tensor in plan.tensors)
    return found


def _held(model: nn.Module, tensor: PlannedTensor, form: str) -> int:
    spec = tensor.base
    if form == "dense" or not isinstance(spec, ScaffoldTensor) or not can_be_virtual(model, tensor):
        return tensor.survey.numel * tensor.survey.dtype.itemsize
    if form == "streamed":
        return 0
    if form == "int4" and fits_kernel(spec):
        return spec.numel // 2
    return 8 * math.ceil(spec.numel * get_family(spec.family).bits / 64)
