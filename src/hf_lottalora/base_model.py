"""What is done to the base model itself: every frozen tensor gets its value, once, in place."""

from __future__ import annotations

import torch
from torch import nn

from .plan import Plan
from .scaffold import ScaffoldTensor, draw_into
from .survey import clean_modules, owner_of


def cast_buffers(model: nn.Module) -> dict[str, str]:
    """Unsaved buffers in half precision by clean path: rotary tables that `model.half()` has rounded."""
    return {
        f"{path}.{name}": str(buffer.dtype).removeprefix("torch.")
        for path, module in clean_modules(model)
        for name, buffer in module._buffers.items()
        if name in module._non_persistent_buffers_set and buffer is not None
        if buffer.dtype in (torch.float16, torch.bfloat16)
    }


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
