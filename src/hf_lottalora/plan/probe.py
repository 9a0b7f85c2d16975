"""Whether an adapter can go around a module's own forward: tried on a small copy, never on the module itself.

Subclasses of linear layers and convolutions compute what they like with their weight. Where that is what the adapter's
equation takes for granted (a linear layer's `x W^T + bias`; for a convolution a result that is linear in W, whatever
its padding), the module's own forward is kept. Otherwise a merged weight would not compute what the adapter does.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .initialization import PrivateRandomness

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

_PLAIN = {nn.Linear.forward, Conv1D.forward, *(kind.forward for kind in CONVOLUTIONS)}
_PLAIN_CONVOLVING = {kind._conv_forward for kind in CONVOLUTIONS}
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Weights above this many elements are tried with fewer inputs and outputs.
_SMALL = 1 << 20
# A power of two rounds nothing, and this one is past what guards against overflow in half precision clamp.
_FACTOR = 2.0**20
_TOLERANCE = 1e-5  # above float32's rounding, below bfloat16's and that of quantised weights


def has_own_forward(module: nn.Module) -> bool:
    """Whether the class, or this instance, computes its output by other code than torch's (or `Conv1D`'s)."""
    held = vars(module)
    # Accelerate's hooks that move weights and inputs between devices stand in front of it.
    forward = held.get("_old_forward" if "_hf_hook" in held else "forward", type(module).forward)
    convolving = getattr(type(module), "_conv_forward", None)
    other = convolving is not None and convolving not in _PLAIN_CONVOLVING
    return other or getattr(forward, "__func__", forward) not in _PLAIN


def why_not_around(module: nn.Module) -> str | None:
    """Why an adapter cannot go around the forward of this linear layer or convolution; None if it can.

    The module, its weights and the global random state stay as they are; weights on the meta device need no values.

    Returns:
        What its forward does, to be continued after "a FalconLinear, whose forward ...".
    """
    weight = module._parameters.get("weight")
    if weight is None or weight.dtype not in _DTYPES:
        return f"multiplies with {'no parameter called weight' if weight is None else f'a weight of {weight.dtype}'}"
    with PrivateRandomness(), torch.no_grad(), torch.compiler.set_stance("force_eager"):  # compiling would take long
        try:
            twin = _small_copy(module)
            for training in (True, False):
                twin.train(training)
                reason = _tried(twin)
                if reason is not None:
                    return reason
        except Exception as error:  # whatever a foreign forward raises
            first_line = str(error).partition("\n")[0]
            return f"cannot be tried on a small copy ({type(error).__name__}: {first_line[:100]})"
    return None


def _small_copy(module: nn.Module) -> Any:
    """A copy in float64 with random parameters, and without hooks."""
    weight: Any = module._parameters["weight"]
    inputs, outputs = (1, 0) if not isinstance(module, Conv1D) else (0, 1)
    sizes, groups = list(weight.shape), getattr(module, "groups", 1)
    if weight.numel() > _SMALL:
        sizes[inputs] = min(sizes[inputs], 64)
        sizes[outputs] = min(sizes[outputs], groups * max(1, 64 // groups))
    memo: dict[int, Any] = {id(held): type(held)() for name, held in vars(module).items() if "_hooks" in name}
    memo[id(vars(module).get("_hf_hook"))] = None  # Accelerate's, which can hold the weights of a whole model
    for name, parameter in module.named_parameters():
        shape = {"weight": sizes, "bias": sizes[outputs : outputs + 1]}.get(name, parameter.shape)
        memo[id(parameter)] = nn.Parameter(torch.randn(tuple(shape), dtype=torch.float64, device="cpu"), False)
    twin = copy.deepcopy(module, memo).to("cpu", torch.float64)
    for name, size in (
        *dict.fromkeys(("in_features", "nx"), sizes[inputs]).items(),
        *dict.fromkeys(("out_features", "nf", "out_channels"), sizes[outputs]).items(),
        ("in_channels", sizes[inputs] * groups),
    ):
        if name in vars(twin):
            setattr(twin, name, size)
    return twin


def _tried(twin: Any) -> str | None:
    convolution = isinstance(twin, CONVOLUTIONS)
    if convolution:
        reach = zip(twin.kernel_size, twin.stride, twin.dilation, strict=True)
        shape = (2, twin.in_channels, *(d * (k - 1) + 1 + 2 * s for k, s, d in reach))
    else:
        shape = (2, 3, twin.weight.shape[0 if isinstance(twin, Conv1D) else 1])
    x = torch.randn(shape, dtype=torch.float64, device="cpu")
    forward = vars(twin).get("_old_forward", twin.forward)

    def result(weight: torch.Tensor, x: torch.Tensor = x) -> Any:
        twin.weight.copy_(weight)
        return forward(x.clone())

    W, V = torch.randn_like(twin.weight), torch.randn_like(twin.weight)
    y = result(W)
    if not isinstance(y, torch.Tensor):
        return f"returns a {type(y).__name__} instead of a tensor"
    if not _same(result(W), y):
        return f"gives another output each time in {'training' if twin.training else 'eval'} mode"
    offset = result(torch.zeros_like(W))
    if _same(y, offset):
        return "does not read its weight"
    if not _same(result(_FACTOR * W) - offset, _FACTOR * (y - offset)):
        return "does not scale with its weight"
    if not _same(result(W + V) - offset, y + result(V) - 2 * offset):
        return "is not linear in its weight"
    if convolution:
        return None
    for weight, rows in ((W, x), (V, _FACTOR * x)):
        W_IO = weight if isinstance(twin, Conv1D) else weight.t()
        expected = rows @ W_IO if twin.bias is None else rows @ W_IO + twin.bias
        if not _same(result(weight, rows), expected):
            return "computes something else than x W^T + bias"
    return None


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and bool((one - other).norm() <= _TOLERANCE * other.norm())
