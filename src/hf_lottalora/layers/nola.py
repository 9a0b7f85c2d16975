"""NOLA (arXiv 2310.02556): A and B as combinations of random matrices, of which only the coefficients are trained.

    A = A0 + sum_i a_i A_i,   B = sum_i b_i B_i,   i = 1 ... k;  a = b = 0 at the start

A0 is what LoRA's A starts as, and frozen: without it both gradients would be zero for ever. A_i and B_i have unit
variance over sqrt(3 k), as U(-1, 1) / sqrt(k) of the authors' code has. They are drawn in blocks whenever the
coefficients have changed, and again for the gradients, and never held.

Shapes: k bases, L layers that share them, m elements of a layer's A or B; coefficients `(L, k)`, bases `(k, m)`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..residency.partitions import is_partitioned
from ..residency.shards import is_sharded
from ..scaffold.tensor import ScaffoldTensor, draw_into
from .bases import SIDE, without_values
from .coefficients import Coefficients
from .functional import ScaledLinear, applied, bound_fast

_BLOCK = 1 << 18  # elements of bases that are in memory at a time: 1 MiB in float32


class Bases(NamedTuple):
    """The k bases of one factor, as rows of a virtual matrix `(2**20, m)`: more of them leave the first as they are."""

    spec: ScaffoldTensor
    k: int

    def blocks(self, like: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """All of them, some rows at a time, in the dtype of `like` and where it is; the memory is used again."""
        m, start = self.spec.shape[1], 0
        step = max(1, _BLOCK // m)
        memory = like.new_empty(min(step, self.k), m)
        while start < self.k:
            rows = slice(start, min(start + step, self.k))
            block = memory[: rows.stop - start]
            if not without_values(like):
                self.spec.fill([start * m], block.view(1, -1))
            yield rows, block
            start = rows.stop

    @property
    def scale(self) -> float:
        """What the bases are multiplied by."""
        return 1 / math.sqrt(3 * self.k)


@bound_fast
class Combined(torch.autograd.Function):
    """`start + scale * coefficients @ bases` for several layers, `(m,)` each. Nothing is kept for backward."""

    @staticmethod
    def forward(bases: Bases, starts: torch.Tensor | None, *coefficients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        dtype = torch.promote_types(coefficients[0].dtype, torch.float32)
        C = torch.stack(coefficients).to(dtype)
        total = C.new_zeros(len(C), bases.spec.shape[1])
        for rows, block in bases.blocks(C):
            total.addmm_(C[:, rows], block)
        total *= bases.scale
        if starts is not None:
            total += starts
        return total.to(coefficients[0].dtype).unbind()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        ctx.bases = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        G = torch.stack(grads).to(torch.promote_types(grads[0].dtype, torch.float32))
        dC = G.new_empty(len(G), ctx.bases.k)
        for rows, block in ctx.bases.blocks(G):
            dC[:, rows] = G @ block.t()
        return None, None, *(dC * ctx.bases.scale).to(grads[0].dtype)


class Member(NamedTuple):
    """One layer's factor: where its coefficients are, what it starts as, and its shape."""

    held: Coefficients
    start: ScaffoldTensor | None
    shape: tuple[int, ...]


class _Made(NamedTuple):
    """Factors as they were made, and of what."""

    factors: tuple[torch.Tensor, ...]
    coefficients: list[torch.Tensor]
    marks: list[tuple[int, int, int]]


class Factors:
    """The factors, A or B, of layers that share bases. They are made again when coefficients have changed, not before:
    evaluation and decoding cost what LoRA's do.
    """

    def __init__(self, bases: Bases) -> None:
        _count_steps()
        self.bases = bases
        self.members: list[Member] = []
        self._made: _Made | None = None
        self._starts: torch.Tensor | None = None  # as large as LoRA's A, and drawn once

    def add(self, member: Member) -> int:
        """A further layer's; its place among them."""
        self.members.append(member)
        return len(self.members) - 1

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # would trace NumPy's drawing
    def get(self, at: int, held: Coefficients) -> torch.Tensor:
        """The factor of the layer in this place, in its shape, with gradients; `held` is what the layer has there."""
        member, made = self.members[at], self._made
        if held is member.held and made is not None and _stands(made, at, held.value):
            return made.factors[at].view(member.shape)
        parameters = [one.held.value for one in self.members]
        if held is not member.held or any(is_sharded(p) or is_partitioned(p) for p in parameters):
            # A replica on another device, or one of which each rank has a part: of the others there is nothing here.
            (alone,) = Combined.apply(self.bases, _drawn([member], held.value), held.value)
            return alone.view(member.shape)  # type: ignore[no-any-return]
        starts = self._starts
        if starts is None or (starts.device, starts.dtype, len(starts)) != _place(held.value, self.members):
            starts = _drawn(self.members, held.value)
            self._starts = None if without_values(held.value) else starts
        factors = Combined.apply(self.bases, starts, *parameters)
        made = _Made(factors, [p.detach().clone() for p in parameters], [_mark(p) for p in parameters])
        self._made = None if without_values(held.value) else made
        return made.factors[at].view(member.shape)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_made": None, "_starts": None}  # what has a graph cannot be copied


def _place(like: torch.Tensor, members: list[Member]) -> tuple[torch.device, torch.dtype, int]:
    return like.device, torch.promote_types(like.dtype, torch.float32), len(members)


@torch.no_grad()
def _drawn(members: list[Member], like: torch.Tensor) -> torch.Tensor | None:
    """What the factors of these layers start as, `(L, m)`; None for zeros."""
    starts = [one.start for one in members if one.start is not None]
    if not starts:
        return None
    device, dtype, count = _place(like, members)
    with torch.inference_mode(False):
        drawn = torch.empty(count, starts[0].numel, dtype=dtype, device=device)
        if not without_values(drawn):
            draw_into({start: row.view(start.shape) for start, row in zip(starts, drawn, strict=True)})
    return drawn


def _stands(made: _Made, at: int, now: torch.Tensor) -> bool:
    """Whether a factor is still that of its coefficients, and can be used here."""
    factor, before = made.factors[at], made.coefficients[at]
    if now.requires_grad and torch.is_grad_enabled() and not factor.requires_grad:
        return False
    if factor.is_inference() and not torch.is_inference_mode_enabled():
        return False
    if without_values(now) or before.device != now.device or before.dtype != now.dtype:
        return False
    if now.device.type != "cpu" and (made.marks[at] != _mark(now) or at):
        return made.marks[at] == _mark(now)  # comparing values waits for the device: of one layer is enough
    return torch.equal(before, now)


class Nola:
    """Where A and B of one layer come from."""

    def __init__(self, A: Factors, at_A: int, B: Factors, at_B: int) -> None:
        self.A, self.at_A, self.B, self.at_B = A, at_A, B, at_B

    def __str__(self) -> str:
        return f"NOLA of {self.A.bases.k} {self.A.bases.spec.family}"

    def start(self, A: Coefficients, B: Coefficients) -> None:
        """Zeros: A = A0, and no update yet."""
        nn.init.zeros_(A.value)
        nn.init.zeros_(B.value)

    def pair(self, A: Coefficients, B: Coefficients) -> tuple[torch.Tensor, torch.Tensor]:
        """As LoRA's, with gradients."""
        return self.A.get(self.at_A, A), self.B.get(self.at_B, B)

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
        return applied(ScaledLinear, x, weight, bias, beta, *self.pair(A, B), scaling, weight_is_IO)


def bases_of(factor: str, shared: str | None, m: int, seed: int, family: str, count: int) -> Bases:
    """Those of A or B, of all layers with as many elements, or of the one at this path."""
    name = f"nola.{factor}.{m}" if shared is None else f"{shared}.nola.{factor}"
    return Bases(ScaffoldTensor(name, (SIDE, m), seed, family), count)


_steps: list[int] = []  # how many steps any optimizer has made: its kernels may write past a tensor's version


def _count_steps() -> None:
    if not _steps:
        _steps.append(0)
        register_optimizer_step_post_hook(_stepped)


def _stepped(*_: Any) -> None:
    _steps[0] += 1


def _mark(parameter: torch.Tensor) -> tuple[int, int, int]:
    return parameter._version, 0 if without_values(parameter) else parameter.data_ptr(), _steps[0]
