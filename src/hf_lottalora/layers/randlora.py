"""RandLoRA (arXiv 2502.00987): an update of full rank, of which only diagonals are trained.

    dW = sum_j B_j diag(lambda_j) A diag(gamma_j),  j = 1 ... n,  n = ceil(d / r)       for O >= I, else its transpose

Shapes: d = min(O, I), D = max(O, I), q = n r; gamma `(n, d)`, lambda `(n, r)`, A `(r, d)`, B_j side by side `(D, q)`.
As one product dW = B U with U `(q, d)`, U[(j, b), i] = lambda[j, b] A[b, i] gamma[j, i] (ours).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..residency.virtual_weight import VirtualWeight
from .bases import basis
from .coefficients import Coefficients
from .functional import (
    ScaledLinear,
    applied,
    bound_fast,
    gradients,
    scaled_plus,
    transformed,
    values_OI,
    without_autocast,
)


class RandLora:
    """Where A and B of one layer come from. Every layer takes the first rows and columns of the same two bases."""

    def __init__(self, seed: int, family: str, r: int, inputs: int, outputs: int) -> None:
        self.d, self.D, self.r = min(inputs, outputs), max(inputs, outputs), r
        self.q = -(-self.d // r) * r
        self.small, self.large = basis("randlora.A", seed, family), basis("randlora.B", seed, family)
        self.small.reserve(r, self.d)
        self.large.reserve(self.D, self.q)
        self.tall = outputs >= inputs

    def __str__(self) -> str:
        return f"RandLoRA of {self.q // self.r} {self.large.spec.family}"

    def start(self, A: Coefficients, B: Coefficients) -> None:
        """Gamma = 1 / d, lambda = 0, so that there is no update yet."""
        nn.init.constant_(A.value, 1 / self.d)
        nn.init.zeros_(B.value)

    def bases(self, like: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """A in the dtype of `like`, a coefficient, and B in the dtype to multiply in."""
        small = self.small.corner(self.r, self.d, like.dtype, like)
        return small, self.large.corner(self.D, self.q, dtype, like)

    def pair(self, A: Coefficients, B: Coefficients) -> tuple[torch.Tensor, torch.Tensor]:
        """`(q, I)` and `(O, q)`, whose product is the update; with gradients."""
        small, large = self.bases(A.value, A.value.dtype)
        return _pair(A.value, B.value, small, large, self.tall)

    def linear(
        self,
        A: Coefficients,
        B: Coefficients,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        beta: torch.Tensor,
        scaling: float,
        weight_is_IO: bool,
    ) -> torch.Tensor:
        """The layer's output, see `ScaledLinear`."""
        small, large = self.bases(A.value, x.dtype)
        trained = A.value, B.value
        return applied(RandLinear, x, weight, bias, beta, *trained, small, large, scaling, weight_is_IO, self.tall)


def folds(rows: int, outputs: int, inputs: int, q: int) -> bool:
    """Whether `(beta W + s dW) x` takes fewer multiplications, forward and backward, than `beta W x + s B (U x)`.

    By shapes alone, so that results do not depend on who measures.
    """
    d, D = min(outputs, inputs), max(outputs, inputs)
    apart = rows * q * ((2 if outputs >= inputs else 3) * D + 3 * d)  # O < I: the product with B is made again
    return apart > outputs * inputs * (rows + 3 * q)


def _pair(
    gamma: torch.Tensor, lam: torch.Tensor, small: torch.Tensor, large: torch.Tensor, tall: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    U = small * gamma.unsqueeze(1)
    U = U * lam.unsqueeze(-1) if transformed() else U.mul_(lam.unsqueeze(-1))
    U = U.flatten(0, 1).to(large.dtype)
    return (U, large) if tall else (large.t(), U.t())


@bound_fast
class RandLinear(torch.autograd.Function):
    """`(beta W + scaling dW) x + bias`, keeping x at most for backward: U, d^2 numbers a layer, is made again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        beta: torch.Tensor,
        gamma: torch.Tensor,
        lam: torch.Tensor,
        small: torch.Tensor,
        large: torch.Tensor,
        scaling: float,
        weight_is_IO: bool,
        tall: bool,
    ) -> torch.Tensor:
        with without_autocast(x):
            A, B = _pair(gamma, lam, small, large, tall)
            if not _folds(x, A, B):
                return ScaledLinear.forward(x, weight, bias, beta, A, B, scaling, weight_is_IO)
            W_OI = scaled_plus(_dense_OI(weight, weight_is_IO, x.dtype), beta, B, A, scaling)
            return F.linear(x, W_OI, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, weight, bias, beta, gamma, lam, small, large, ctx.scaling, ctx.weight_is_IO, ctx.tall = inputs
        needs_x = any(ctx.needs_input_grad[i] for i in (1, 3, 4, 5))  # of weight, beta, gamma and lambda
        ctx.save_for_backward(x if needs_x else None, weight, beta, gamma, lam, small, large)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, beta, gamma, lam, small, large = ctx.saved_tensors
        need_gamma, need_lambda = ctx.needs_input_grad[4:6]
        need_U, tall = need_gamma or need_lambda, ctx.tall
        with without_autocast(grad):
            A, B = _pair(gamma, lam, small, large, tall)
            if _folds(grad, A, B):
                dx, dweight, dbias, dbeta, dU = _folded_gradients(ctx, grad, x, weight, beta, A, B)
            else:
                needs = (*ctx.needs_input_grad[:4], need_U and tall, need_U and not tall)
                found = gradients(needs, grad, x, weight, beta, A, B, ctx.scaling, ctx.weight_is_IO, ctx.bias_dtype)
                dx, dweight, dbias, dbeta, dA, dB = found
                dU = dA if tall else None if dB is None else dB.t()
            dgamma = dlambda = None
            if dU is not None:
                through_A = dU.to(gamma.dtype).unflatten(0, lam.shape) * small  # (n, r, d)
                if need_gamma:
                    dgamma = (lam.unsqueeze(1) @ through_A).squeeze(1)
                if need_lambda:
                    dlambda = (through_A * gamma.unsqueeze(1)).sum(-1)  # faster than a product with one column
        return dx, dweight, dbias, dbeta, dgamma, dlambda, None, None, None, None, None


def _folds(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> bool:
    """Of x, or of the output's gradient, which has as many rows."""
    rows = x.numel() // x.shape[-1]
    return folds(rows, B.shape[0], A.shape[1], A.shape[0])


def _dense_OI(weight: torch.Tensor, weight_is_IO: bool, dtype: torch.dtype) -> torch.Tensor:
    """All of it, drawn once where it is not in memory."""
    return values_OI(weight.dense() if isinstance(weight, VirtualWeight) else weight, weight_is_IO, dtype)


def _folded_gradients(
    ctx: Any,
    grad: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor,
    beta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
) -> tuple[Any, Any, Any, Any, Any]:
    """Of x, weight, bias, beta and U, where forward has summed the weights."""
    need_x, need_weight, need_bias, need_beta = ctx.needs_input_grad[:4]
    need_U, scaling, dtype = any(ctx.needs_input_grad[4:6]), ctx.scaling, grad.dtype
    dx = dweight = dbias = dbeta = dU = None
    g_NO, W_OI = grad.reshape(-1, grad.shape[-1]), _dense_OI(weight, ctx.weight_is_IO, dtype)
    if need_x:
        dx = (g_NO @ scaled_plus(W_OI, beta, B, A, scaling)).view(*grad.shape[:-1], A.shape[1])
    if x is not None:
        dW_OI = g_NO.t() @ x.reshape(-1, x.shape[-1])
        if need_beta:
            exact = torch.promote_types(dtype, torch.float32)
            dbeta = (W_OI * dW_OI).sum(dtype=exact).to(beta.dtype).reshape(1)
        if need_U:
            dU = scaling * (B.t() @ dW_OI if ctx.tall else A @ dW_OI.t())
        if need_weight:
            dweight = (dW_OI * beta.to(dtype)).to(weight.dtype)
            dweight = dweight.t() if ctx.weight_is_IO else dweight
    if need_bias:
        dbias = g_NO.sum(0).to(ctx.bias_dtype)
    return dx, dweight, dbias, dbeta, dU
