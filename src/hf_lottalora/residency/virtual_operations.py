"""Operations on weights that are not in memory that do without all values at once, or without any."""

from __future__ import annotations

from typing import Any

import torch

from ..scaffold.families import get_family
from ..scaffold.gpu import kernels_for
from .int4 import INT4_DTYPES, MOST_ROWS, int4_product
from .virtual_weight import HANDLERS, VirtualWeight, held_by

aten = torch.ops.aten


def _same(weight: VirtualWeight, *args: Any, **kwargs: Any) -> VirtualWeight:
    return weight._like()


def _to_copy(weight: VirtualWeight, *, dtype: Any = None, device: Any = None, **kwargs: Any) -> VirtualWeight:
    device = weight.device if device is None else torch.device(device)
    dtypes = weight.dtypes if dtype in (None, weight.dtype) else (*weight.dtypes, dtype)
    words, codes = (
        (weight.words, weight.codes) if device == weight.device else held_by(weight.scaffold, weight.residency, device)
    )
    return weight._like(device=device, dtypes=dtypes, words=words, codes=codes)


def _t(weight: VirtualWeight) -> VirtualWeight:
    return weight._like(transposed=not weight.transposed)


def _transpose(weight: VirtualWeight, one: int, other: int) -> Any:
    return _t(weight) if weight.dim() == 2 and {one % 2, other % 2} == {0, 1} else NotImplemented


def few_rows_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    A: torch.Tensor | None = None,
    B: torch.Tensor | None = None,
    scaling: float = 1.0,
) -> torch.Tensor | None:
    """`beta * x W^T + scaling * (x A^T) B^T + bias` by the GPU kernel for packed weights, or None where it cannot.

    For x `(N, I)` of few rows and W `(O, I)`, as in decoding; each packed word is read once and W is never made.
    """
    if not isinstance(weight, VirtualWeight) or weight.words is None or weight.transposed:
        return None
    kernels, spec = kernels_for(x.device), weight.scaffold
    if kernels is None or not 0 < len(x) <= kernels.MOST_ROWS or x.dtype not in INT4_DTYPES:
        return None
    aligned = len(spec.shape) == 2 and spec.shape[1] * get_family(spec.family).bits % 32 == 0
    if not aligned or spec.zero_row is not None or weight.casts != (x.dtype,):
        return None
    hidden = None if A is None else torch.nn.functional.linear(x, A.to(x.dtype))
    table = spec.table_on(x.dtype, x.device)
    y: torch.Tensor = kernels.packed_linear(x, weight.words, table, spec.shape[0], beta, bias, hidden, B, scaling)
    return y


def _product(x: torch.Tensor, weight: VirtualWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x @ weight + bias` by chunks of the scaffold's rows: they are columns of the result, or parts of the sum."""
    rows = weight.scaffold.shape[0]
    if not weight.transposed:
        return _summed(x, weight, bias)
    few = few_rows_product(x, _t(weight), bias)
    if few is not None:
        return few
    if weight.codes is not None and len(x) <= MOST_ROWS and x.dtype in INT4_DTYPES:
        y = int4_product(x, weight.codes, weight.largest())
        return y if bias is None else y + bias
    y = x.new_empty(len(x), rows)
    for first, last, values in weight.row_chunks():
        out = y[:, first:last]
        if bias is None:
            torch.mm(x, values.t(), out=out)
        else:
            torch.addmm(bias.expand(rows)[first:last], x, values.t(), out=out)
    return y


def _summed(x: torch.Tensor, weight: VirtualWeight, bias: torch.Tensor | None) -> torch.Tensor:
    rows = weight.scaffold.shape[0]
    y: torch.Tensor | None = None
    for first, last, values in weight.row_chunks():
        if last - first == rows:
            return x @ values if bias is None else torch.addmm(bias, x, values)
        part = (x[:, first:last] @ values).to(torch.promote_types(x.dtype, torch.float32))
        y = part if y is None else y.add_(part)
    assert y is not None
    return (y if bias is None else y + bias).to(x.dtype)


def _mm(x: torch.Tensor, weight: torch.Tensor) -> Any:
    if isinstance(x, VirtualWeight) or not isinstance(weight, VirtualWeight):
        return NotImplemented
    return _product(x, weight)


def _addmm(bias: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    if isinstance(bias, VirtualWeight) or isinstance(x, VirtualWeight) or bias.dim() != 1 or (beta, alpha) != (1, 1):
        return NotImplemented
    return _product(x, weight, bias)  # type: ignore[arg-type]


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
    if isinstance(x, VirtualWeight) or not isinstance(weight, VirtualWeight):
        return NotImplemented
    return _product(x.reshape(-1, x.shape[-1]), _t(weight), bias).view(*x.shape[:-1], weight.shape[0])


def _embedding(weight: torch.Tensor, ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Only the rows that are asked for, on a CPU each once."""
    if not isinstance(weight, VirtualWeight) or weight.transposed:
        return NotImplemented
    if kernels_for(weight.device) is not None:  # as torch does there, without waiting to look at the ids
        return weight.slices(ids.reshape(-1).long() * weight.shape[1], weight.shape[1]).view(
            *ids.shape, weight.shape[1]
        )
    unique, inverse = ids.reshape(-1).unique(return_inverse=True)
    if len(unique) and not 0 <= int(unique[0]) <= int(unique[-1]) < weight.shape[0]:
        raise IndexError(f"index out of range: rows {int(unique[0])} to {int(unique[-1])} of {weight.shape[0]}")
    width = weight.shape[1]
    rows = weight.slices((unique * width).tolist(), width)
    return rows[inverse.to(rows.device)].view(*ids.shape, width)


def _is_same(weight: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether a weight that is not in memory would keep its values if it became the other tensor."""
    if not isinstance(weight, VirtualWeight):
        return False
    if isinstance(other, VirtualWeight):
        return all(getattr(weight, name) == getattr(other, name) for name in ("scaffold", "dtypes", "transposed"))
    return other.shape == weight.shape and torch.equal(weight.dense(), other.to(weight.device, weight.dtype))


def _copy(weight: torch.Tensor, source: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Nothing, where they are the same anyway."""
    return weight if _is_same(weight, source) else NotImplemented


def _lerp(weight: torch.Tensor, end: torch.Tensor, share: Any) -> Any:
    """Nothing, where a weight is averaged with itself."""
    return weight if _is_same(weight, end) else NotImplemented


def _foreach_lerp(weights: list[torch.Tensor], ends: list[torch.Tensor], share: Any) -> Any:
    """As `torch.optim.swa_utils` averages models: a weight with itself is itself, the others move."""
    moving = [at for at, (weight, end) in enumerate(zip(weights, ends, strict=True)) if not _is_same(weight, end)]
    if any(isinstance(weights[at], VirtualWeight) for at in moving):
        return NotImplemented
    if moving:
        shares = [share[at] for at in moving] if isinstance(share, (list, tuple)) else share
        torch._foreach_lerp_([weights[at] for at in moving], [ends[at] for at in moving], shares)
    return None


def _select(weight: VirtualWeight, dim: int, index: int) -> Any:
    """One entry of the first dimension, such as one expert."""
    if dim % weight.dim() != 0 or weight.transposed:
        return NotImplemented
    shape = weight.shape[1:]
    return weight.slices([index % weight.shape[0] * shape.numel()], shape.numel()).view(shape)


HANDLERS.update(
    {
        aten.copy_: _copy,
        aten.lerp_: _lerp,
        aten._foreach_lerp_: _foreach_lerp,
        aten.detach: _same,
        aten.alias: _same,
        aten.clone: _same,
        aten.lift_fresh: _same,
        aten._to_copy: _to_copy,
        aten.t: _t,
        aten.transpose: _transpose,
        aten.mm: _mm,
        aten.addmm: _addmm,
        aten.linear: _linear,
        aten.embedding: _embedding,
        aten.select: _select,
    }
)
