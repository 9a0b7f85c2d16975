"""The equation's arithmetic: `y = beta * (W x) + scaling * B A x + bias` with its gradients.

beta costs no memory: autograd would keep W x for its gradient, but d beta = <g, W x> = <W^T g, x>, and W^T g is
needed for the input's gradient anyway, as x is for A's. So x is all that is kept.

Shape suffixes: N rows of the flattened input, I inputs, O outputs, r rank.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from ..residency.foreign import is_foreign, values_of
from ..residency.virtual_operations import few_rows_product
from .bases import without_values


def matmul_dtype(x: torch.Tensor) -> torch.dtype:
    """What autocast would multiply in, else the input's own dtype: no cast that PEFT or torch would not need."""
    kind = x.device.type
    known = torch.amp.is_autocast_available(kind)  # the meta device has none
    cast = known and torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if cast else x.dtype


def without_autocast(x: torch.Tensor) -> AbstractContextManager[Any]:
    """Autocast switched off for the device of `x`, where it is on."""
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else nullcontext()


def bound_fast(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """The same function; torch binds arguments by forward's signature in each call, and would derive it each time."""
    function.forward.__signature__ = inspect.signature(function.forward)  # type: ignore[attr-defined]
    return function


def applied(function: type[torch.autograd.Function], *args: Any) -> torch.Tensor:
    """`function.apply(*args)`; where nothing is recorded without its cost, which decoding would pay in every layer."""
    recorded = transformed() or torch.compiler.is_compiling()
    result: torch.Tensor = function.apply(*args) if recorded else function.forward(*args)
    return result


@bound_fast
class ScaledLinear(torch.autograd.Function):
    """`beta * x W^T + scaling * (x A^T) B^T + bias`, keeping x at most for backward. `A = B = None` leaves them out."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        beta: torch.Tensor,
        A: torch.Tensor | None,
        B: torch.Tensor | None,
        scaling: float,
        weight_is_IO: bool,
    ) -> torch.Tensor:
        dtype = x.dtype
        with without_autocast(x):
            x_NI = x.reshape(-1, x.shape[-1])
            W_OI = _as_OI(weight, weight_is_IO, dtype)
            y_NO = few_rows_product(x_NI, W_OI, bias, beta, A, B, scaling)
            if y_NO is None:
                y_NO = F.linear(x_NI, W_OI)
                if A is not None and B is not None:
                    y_NO = _times_plus(y_NO, beta, F.linear(x_NI, A.to(dtype)), B.to(dtype).t(), scaling)
                else:
                    y_NO = _times(y_NO, beta)
                if bias is not None:
                    y_NO = y_NO + bias.to(dtype) if transformed() else y_NO.add_(bias)
        # A view would be refused in place: its base was made here, where autograd does not look.
        return torch.ops.aten._unsafe_view(y_NO, (*x.shape[:-1], y_NO.shape[-1]))  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, weight, bias, beta, A, B, scaling, weight_is_IO = inputs
        needs_x = any(ctx.needs_input_grad[i] for i in (1, 3, 4, 5))  # of weight, beta, A and B
        ctx.save_for_backward(x if needs_x else None, weight, beta, A, B)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.scaling, ctx.weight_is_IO = scaling, weight_is_IO

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, beta, A, B = ctx.saved_tensors
        needs = ctx.needs_input_grad[:6]
        with without_autocast(grad):
            found = gradients(needs, grad, x, weight, beta, A, B, ctx.scaling, ctx.weight_is_IO, ctx.bias_dtype)
        return *found, None, None


def gradients(
    needs: tuple[bool, ...],
    grad: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor,
    beta: torch.Tensor,
    A: torch.Tensor | None,
    B: torch.Tensor | None,
    scaling: float,
    weight_is_IO: bool,
    bias_dtype: torch.dtype | None,
) -> tuple[torch.Tensor | None, ...]:
    """Of x, weight, bias, beta, A and B of `ScaledLinear`, those that are needed; `grad` is the output's."""
    need_x, need_weight, need_bias, need_beta, need_A, need_B = needs
    dx: Any = None
    dweight = dbias = dbeta = dA = dB = None
    dtype = grad.dtype
    x_NI: Any = None if x is None else x.reshape(-1, x.shape[-1])
    g_NO = grad.reshape(-1, grad.shape[-1])
    if need_x or need_beta:
        dx = g_NO @ values_OI(weight, weight_is_IO, dtype)  # W^T g, before beta
    if need_beta:
        exact = torch.promote_types(dtype, torch.float32)
        dbeta = (dx * x_NI).sum(dtype=exact).to(beta.dtype).reshape(1)
    if A is None or B is None:
        dx = _times(dx, beta) if need_x else None
    else:
        # Products with r rows are up to twice as fast on CPUs as those with r columns.
        A_rI = A.to(dtype)
        gB_rN = B.to(dtype).t() @ g_NO.t()
        if need_x:
            dx = _times_plus(dx, beta, gB_rN.t(), A_rI, scaling)
        if need_A:
            dA = (scaling * (gB_rN @ x_NI)).to(A.dtype)
        if need_B:
            dB_rO = scaling * ((A_rI @ x_NI.t()) @ g_NO)
            dB = dB_rO.t().to(B.dtype).contiguous()
    if need_weight:
        dweight = (g_NO.t() @ x_NI * beta).to(weight.dtype)
        dweight = dweight.t() if weight_is_IO else dweight
    if need_bias:
        dbias = g_NO.sum(0).to(bias_dtype)
    dx = dx.view(*grad.shape[:-1], dx.shape[-1]) if need_x else None
    return dx, dweight, dbias, dbeta, dA, dB


@bound_fast
class ScaledEmbedding(torch.autograd.Function):
    """`beta * E(ids)` without keeping E(ids), which is looked up again for beta's gradient. `weight` is embed's."""

    generate_vmap_rule = True

    @staticmethod
    def forward(beta: torch.Tensor, ids: torch.Tensor, weight: torch.Tensor, embed: nn.Module) -> torch.Tensor:
        rows: torch.Tensor = embed(ids)
        return rows * beta.to(rows.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        beta, ids, weight, ctx.embed = inputs
        ctx.save_for_backward(beta, ids, weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        beta, ids, weight = ctx.saved_tensors
        exact = torch.promote_types(grad.dtype, torch.float32)
        dbeta = (grad * functional_call(ctx.embed, {"weight": weight}, (ids,))).sum(dtype=exact)
        return dbeta.to(beta.dtype).reshape(1), None, None, None


@bound_fast
class ScaledConv(torch.autograd.Function):
    """`beta * conv(x, W)` for x `(N, I, ...)`, keeping only x: d beta = <g, conv(x, W)> = <conv^T(g, W), x>."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: torch.Tensor,
        weight: torch.Tensor,
        beta: torch.Tensor,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int,
    ) -> torch.Tensor:
        with without_autocast(x):
            none = (0,) * len(stride)
            y = torch.convolution(x, _cast(weight, x.dtype), None, stride, padding, dilation, False, none, groups)
            return _times(y, beta)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, weight, beta, *ctx.options = inputs
        ctx.save_for_backward(x, weight, beta)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, beta = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.options
        need_x, need_weight, need_beta = ctx.needs_input_grad[:3]
        dx = dweight = dbeta = None
        with without_autocast(x):
            dx, dweight, _ = torch.ops.aten.convolution_backward(
                grad.to(x.dtype),
                x,
                _cast(weight, x.dtype),
                None,
                stride,
                padding,
                dilation,
                False,
                (0,) * len(stride),
                groups,
                (need_x or need_beta, need_weight, False),
            )
            if need_beta:
                exact = torch.promote_types(x.dtype, torch.float32)
                dbeta = (dx * x).sum(dtype=exact).to(beta.dtype).reshape(1)
            dx = _times(dx, beta) if need_x else None
            dweight = (dweight * beta).to(weight.dtype) if need_weight else None
        return dx, dweight, dbeta, None, None, None, None


def transformed() -> bool:
    """Whether values must not be overwritten: autograd records a second derivative, or `torch.func` transforms."""
    return torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()


def _times(y: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    return y * beta.to(y.dtype) if transformed() else y.mul_(beta)


def _times_plus(
    y: torch.Tensor, beta: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scaling: float
) -> torch.Tensor:
    """`beta * y + scaling * left @ right`, in y's memory where that is allowed."""
    if transformed():
        return _times(y, beta) + scaling * (left @ right)
    if type(y) is torch.Tensor and y.device.type == "cpu" and not torch.compiler.is_compiling():
        # One pass over y. Elsewhere reading beta would wait for the device, or break the graph.
        return y.addmm_(left, right, beta=beta.item(), alpha=scaling)
    return y.mul_(beta).addmm_(left, right, alpha=scaling)


def scaled_plus(
    W_OI: torch.Tensor, beta: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scaling: float
) -> torch.Tensor:
    """`beta * W + scaling * left @ right`, in new memory."""
    if transformed():
        return W_OI * beta.to(W_OI.dtype) + scaling * (left @ right)
    if W_OI.device.type == "cpu" and not torch.compiler.is_compiling() and not without_values(beta):
        return torch.addmm(W_OI, left, right, beta=beta.item(), alpha=scaling)  # one pass
    return (W_OI * beta.to(W_OI.dtype)).addmm_(left, right, alpha=scaling)


def _as_OI(weight: torch.Tensor, weight_is_IO: bool, dtype: torch.dtype) -> torch.Tensor:
    weight = _cast(weight, dtype)
    return weight.t() if weight_is_IO else weight


def values_OI(weight: torch.Tensor, weight_is_IO: bool, dtype: torch.dtype) -> torch.Tensor:
    """The weight `(O, I)` in a dtype to multiply in, dequantised."""
    return values_of(_as_OI(weight, weight_is_IO, dtype), dtype)


def _cast(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # A weight is cast only where autocast would cast it; otherwise a mismatch is the caller's error, as in nn.Linear.
    # What is quantised brings a product of its own.
    return weight.to(dtype) if dtype in (torch.float16, torch.bfloat16) and not is_foreign(weight) else weight
