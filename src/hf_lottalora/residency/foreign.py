"""Weights of a base model that something else holds: offloaded by Accelerate, or in a tensor class of its own.

Such as torchao's quantised ones. They can be multiplied with and read, but not drawn into.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.utils import align_module_device, has_offloaded_params, named_module_tensors
from torch import nn

from .virtual_weight import VirtualWeight

OFFLOADED = "offloaded by Accelerate"


def is_foreign(tensor: torch.Tensor) -> bool:
    """Whether a tensor is of a class with its own operations, which may lack those that a draw or a copy needs."""
    own = type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    return own and not isinstance(tensor, VirtualWeight)


def values_of(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The values of a foreign tensor as an ordinary one, in this dtype if one is given; another stays what it is."""
    return tensor.dequantize().to(dtype) if is_foreign(tensor) else tensor


def foreign_tensors(model: nn.Module) -> dict[int, str]:
    """By id what holds each tensor that nothing can be drawn into, in words."""
    found = {}
    for module in model.modules():
        own = [parameter for parameter in module._parameters.values() if parameter is not None]
        found.update({id(tensor): f"a {type(tensor).__name__}" for tensor in own if is_foreign(tensor)})
        if "_hf_hook" in vars(module) and has_offloaded_params(module):
            hook: Any = module._hf_hook
            inside = named_module_tensors(module, include_buffers=True, recurse=hook.place_submodules)
            found.update({id(tensor): OFFLOADED for _, tensor in inside if tensor.is_meta})
    return found


@contextmanager
def in_memory(*modules: nn.Module) -> Iterator[None]:
    """Within the context, what Accelerate has offloaded of these modules is where it computes."""
    with ExitStack() as stack:
        for part in {part: None for module in modules for part in module.modules()}:
            if (
                "_hf_hook" in vars(part)
                and has_offloaded_params(part)
                and any(tensor.is_meta for tensor in part.parameters())
            ):  # else it is already
                stack.enter_context(align_module_device(part))
        yield
