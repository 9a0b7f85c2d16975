"""The modules of a model that an adapter could go on, before anything is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers.pytorch_utils import Conv1D

from ..layers.attention import projections
from ..paths import clean_modules
from .probe import CONVOLUTIONS, has_own_forward, why_not_around
from .structure import token_projections, weights_read

RECURRENT = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)


@dataclass(frozen=True)
class SurveyedModule:
    """A module that owns a weight matrix or table: its path, what PEFT would wrap it as, and its sizes.

    `places` are the paths of the attributes that are it, more than one where a model uses it under several names: an
    adapter, which takes its place, would take one of them. A module above that is shared counts once. One that has
    several matrices has them in `matrices`: parameter below the module, outputs and inputs by name. `mixes_tokens` says
    whether it projects what attends, or mixes tokens otherwise; `is_read` whether its weight is read without a call.
    `reason` is why no adapter goes on a module of a class that could carry one, where the kind is "other" for it: say,
    why none goes around the code of a subclass that computes its output by its own (`own_forward`).
    """

    path: str
    places: tuple[str, ...]
    kind: Literal["linear", "conv", "embedding", "projection", "other"]
    type_name: str
    in_features: int
    out_features: int
    in_head: bool
    kernel: tuple[int, ...] = ()
    groups: int = 1
    matrices: Mapping[str, tuple[str, int, int]] = field(default_factory=dict, hash=False)
    own_forward: bool = False
    reason: str = ""
    mixes_tokens: bool = False
    is_read: bool = False


def surveyed_modules(model: nn.Module, in_head: Callable[[str], bool]) -> Iterator[SurveyedModule]:
    """Each module that has a weight, once; `in_head` says of a tensor's path whether it lies in the head."""
    seen: set[int] = set()
    mixing, read = token_projections(model), weights_read(model)
    places: dict[int, list[str]] = {}
    for path, parent in model.named_modules():
        for name, child in parent._modules.items():
            places.setdefault(id(child), []).append(f"{path}.{name}" if path else name)
    for path, module in clean_modules(model):
        weight = weight_of(module)
        if id(module) in seen or not (isinstance(weight, torch.Tensor) or isinstance(module, RECURRENT)):
            continue
        seen.add(id(module))
        shape = weight.shape if isinstance(weight, torch.Tensor) else torch.Size()
        kind: Literal["linear", "conv", "embedding", "projection", "other"] = "other"
        kernel: tuple[int, ...] = ()
        matrices: dict[str, tuple[str, int, int]] = {}
        sizes, groups = (0, 0), 1
        own_forward, reason = False, None
        # nn.MultiheadAttention reads its output projection's weight past forward: the adapter is on the whole of it.
        past_forward = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
        if isinstance(module, (nn.Linear, Conv1D, *CONVOLUTIONS)) and not past_forward:
            own_forward = has_own_forward(module)
            reason = why_not_around(module) if own_forward else None
            if is_parametrized(module, "weight"):
                reason = "reads a weight that torch.nn.utils.parametrize computes"
            elif module._forward_hooks or module._forward_pre_hooks:
                reason = "has hooks, which an adapter would pass by: register yours after get_peft_model"
        elif isinstance(module, nn.Embedding) and writes_into_weight(module):
            reason = "writes into its table (max_norm)"
        if past_forward or reason is not None:
            pass
        elif isinstance(module, nn.Linear):
            kind, sizes = "linear", (shape[1], shape[0])
        elif isinstance(module, Conv1D):
            kind, sizes = "linear", (shape[0], shape[1])
        elif isinstance(module, CONVOLUTIONS):
            kind, sizes = "conv", (module.in_channels, module.out_channels)
            kernel, groups = tuple(module.kernel_size), module.groups
        elif isinstance(module, nn.Embedding) and _looks_up_ids(module):
            kind, sizes = "embedding", (shape[0], shape[1])
        elif isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward:
            kind = "projection"
            for name, weight in projections(module).items():
                outputs, inputs = module.get_parameter(weight).shape
                matrices[name] = (weight, outputs, inputs)
        where = tuple(places.get(id(module), (path,)))
        yield SurveyedModule(
            path,
            where,
            kind,
            type(module).__name__,
            *sizes,
            in_head(f"{path}.weight"),
            kernel,
            groups,
            matrices,
            own_forward,
            reason or "",
            mixes_tokens=any(place in mixing for place in where),
            is_read=any(place in read for place in where),
        )


def weight_of(module: nn.Module) -> Any:
    """A module's weight; what it is computed from where it is: a look may change its state (spectral norm)."""
    if not is_parametrized(module, "weight"):
        return getattr(module, "weight", None)
    held: Any = module.parametrizations
    return max(held.weight._parameters.values(), key=torch.Tensor.numel)  # weight norm: the direction


def writes_into_weight(module: nn.Module) -> bool:
    """Whether its forward shortens rows of its weight in place, as an embedding's with `max_norm` does."""
    return getattr(module, "max_norm", None) is not None


def _looks_up_ids(module: nn.Embedding) -> bool:
    # Some position tables take a mask and compute their own ids: an adapter beside them would see the mask. Those with
    # an embed_scale only multiply, but where a second parameter stands in for some of the rows.
    scales = hasattr(module, "embed_scale") and len(module._parameters) == 1
    return type(module).forward is nn.Embedding.forward or scales
