"""What is done to the base model itself: every frozen tensor gets its value, once, in place."""

from __future__ import annotations

import torch
from torch import nn

from .plan import Plan
from .scaffold import ScaffoldTensor, draw_into
from .survey import clean_modules, owner_of


def other_dtypes(model: nn.Module, dtype: torch.dtype | None) -> dict[str, str]:
    """Dtypes by clean path that building the architecture in `dtype` would not give.

    Unsaved buffers in half precision (rotary tables that `model.half()` has rounded), and parameters that some
    architectures hold in another precision than the rest.
    """
    found = {}
    for path, module in clean_modules(model):
        for name, buffer in module._buffers.items():
            unsaved = name in module._non_persistent_buffers_set
            if buffer is not None and unsaved and buffer.dtype in (torch.float16, torch.bfloat16):
                found[f"{path}.{name}"] = buffer.dtype
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point() and parameter.dtype != dtype:
                found[f"{path}.{name}"] = parameter.dtype
    return {path: str(found[path]).removeprefix("torch.") for path in found}


def check_loadable(model: nn.Module, plan: Plan) -> None:
    """Refuse a model on the meta device that would be left with tensors without a value.

    Raises:
        ValueError: a buffer is on the meta device, or a parameter there is neither drawn nor saved.
    """
    for path, module in clean_modules(model):
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                raise ValueError(
                    f"Buffer '{path}.{name}' is on the meta device, and nothing here can compute it. Build the model "
                    "under accelerate.init_empty_weights(include_buffers=False) instead of torch.device('meta')."
                )
    for tensor in plan.tensors:
        live = getattr(*owner_of(model, tensor.path))
        if live.is_meta and tensor.base is None and not tensor.saved:
            raise ValueError(
                f"{tensor.path!r} is on the meta device and is neither drawn nor saved, so it has no value. Load the "
                "base model's weights first, or pass redraw='all'."
            )


def materialise(model: nn.Module, plan: Plan) -> None:
    """Give every frozen tensor of the base model its value: the scaffold in one parallel pass, in place."""
    draws = {}
    for tensor in plan.tensors:
        owner, attribute = owner_of(model, tensor.path)
        live = getattr(owner, attribute)
        if live.is_meta and tensor.role != "trained":
            live = nn.Parameter(torch.empty(live.shape, dtype=live.dtype), requires_grad=False)
            for alias in tensor.survey.aliases:
                owner, attribute = owner_of(model, alias)
                owner._parameters[attribute] = live
        if tensor.role == "trained":
            continue
        if isinstance(tensor.base, ScaffoldTensor):
            draws[tensor.base] = live
        elif tensor.base is not None:
            with torch.no_grad():
                live.copy_(tensor.base)
    draw_into(draws)
