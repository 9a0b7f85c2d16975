"""The tensors of an adapter file in fewer bytes: fewer digits where that was asked for, and no rows that are as drawn.

What is read from a file and written again gives the same bytes: a value is rounded to what its own dtype can hold, and
scales have so few digits that codes and scales come out of the values again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ..options import SaveDtype
from ..plan.plan import MANIFEST_KEY, PREFIX, Plan
from ..plan.storage import FORMS, ROWS_KEY, SCALES_KEY, Shrinkable, described
from ..scaffold.tensor import ScaffoldTensor
from .reader import ArtifactError
from .stored_fields import Table, checked_forms, checked_tables

_MOST = 127  # codes are from -127 to 127
_LEAST_SCALE = 2.0**-110  # of float32, so that no product with a code is subnormal
_ROWS_MUST_SAVE = 400  # bytes: what manifest and header say of a table of which rows are stored
_SAME_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Loss(NamedTuple):
    """How far tensors x are from what a file holds of them.

    Attributes:
        relative: ||x - stored|| / ||x||, over all tensors of a group; three digits.
        largest: of |x - stored| in any element; three digits.
    """

    relative: float
    largest: float


class _Shrunk(NamedTuple):
    values: torch.Tensor
    scales: torch.Tensor | None = None

    def restored(self) -> torch.Tensor:
        """The values that a reader of the file gets."""
        return self.values if self.scales is None else self.values.float() * self.scales.float()


def loss_in(stored: Mapping[str, Any] | None) -> dict[str, Loss]:
    """The loss of each group of tensors that are stored with fewer digits; empty where none are."""
    return {group: Loss(*errors) for group, errors in (stored or {}).get("loss", {}).items()}


def loss_text(stored: Mapping[str, Any] | None) -> str | None:
    """The same for people, None where nothing is lost."""
    errors = ", ".join(f"{100 * error.relative:.2g} % of {group}" for group, error in loss_in(stored).items())
    return f"{stored['dtype']}, with a relative error of {errors}" if stored and errors else None


# ---- writing ---------------------------------------------------------------------------------------------------------


def encoded(
    plan: Plan,
    tensors: Mapping[str, torch.Tensor],
    save_dtype: SaveDtype | None,
    before: Mapping[str, Any] | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """The tensors as a file holds them, and what its manifest says of that.

    Args:
        plan: of the adapter.
        tensors: all that the plan saves, by key.
        save_dtype: the config's.
        before: what the manifest said of the file that they were loaded from: where nothing is lost now, because they
            have not changed since, what was lost then is said again.

    Raises:
        ValueError: a value is not finite, or too large for the dtype.
    """
    found = dict(tensors)
    drawn, shrinkable, losses = plan.drawn_tables(), plan.shrinkable(), _Losses()
    forms: dict[str, SaveDtype | None] = {}
    scales: list[torch.Tensor] = []
    rows: list[torch.Tensor] = []
    tables: dict[str, Table] = {}
    for key in sorted(shrinkable):
        tensor, x = shrinkable[key], tensors[key].detach()
        form = forms[key] = tensor.form(x.dtype, save_dtype)
        own = _own_rows(key, x, drawn[key], tensor, form) if key in drawn else None
        if own is not None:
            tables[key] = Table.of(len(own), x.dtype, drawn[key])
            rows.append(own.to("cpu", torch.int32))
        elif form is None:
            losses.add(tensor.group, x, x)
            continue
        shrunk = _shrunk(key, x if own is None else x[own], tensor, form)
        restored = shrunk.restored().to(x.dtype)
        losses.add(tensor.group, x, restored if own is None else tables[key].completed(drawn[key], own, restored))
        found[key] = shrunk.values
        if shrunk.scales is not None:
            scales.append(shrunk.scales.flatten().cpu())
    found |= {SCALES_KEY: torch.cat(scales)} if scales else {}
    found |= {ROWS_KEY: torch.cat(rows)} if rows else {}
    recorded = loss_in(before)
    groups = sorted({shrinkable[key].group for key, form in forms.items() if form})
    loss = {group: losses.of(group, recorded.get(group)) for group in groups}
    stacked = plan.stacked
    for key, parts in stacked.items():
        found[key] = torch.stack([found.pop(part) for part in parts])
    rows_of = {key: table._asdict() for key, table in tables.items()}
    return found, described(save_dtype, forms, rows_of, loss, stacked)


def _shrunk(key: str, x: torch.Tensor, tensor: Shrinkable, form: SaveDtype | None) -> _Shrunk:
    if form is None:
        return _Shrunk(x)
    shrunk = _codes(x, tensor.scales_of(tuple(x.shape))) if form == "int8" else _Shrunk(x.to(FORMS[form]))
    finite = bool(x.isfinite().all())
    if not (finite and bool(shrunk.restored().to(x.dtype).isfinite().all())):
        found = f"up to {float(x.abs().max()):.3g}" if finite else "that are not finite"
        raise ValueError(
            f"{key.removeprefix(PREFIX)!r} cannot be saved in {form}: it has values {found}. Nothing was written. With "
            "save_dtype=None every value is saved as it is."
        )
    return shrunk


def _codes(x: torch.Tensor, shape: tuple[int, ...]) -> _Shrunk:
    """Integers from -127 to 127, and factors of this shape, bfloat16, that make them values again.

    The largest value that shares a scale gets the code 127, or in half precision one from 64 to 127. What is restored
    of it is that code times the scale, exactly: so the same scale follows from it, and the same codes.
    """
    over = [at for at, size in enumerate(shape) if size == 1]
    largest = x.abs().amax(dim=over, keepdim=True)
    if x.dtype.itemsize < 4:  # which holds products of codes and powers of two
        info = torch.finfo(x.dtype)
        exponents = torch.frexp(largest.double() / (_MOST + 0.5)).exponent
        scales = torch.ldexp(torch.ones_like(largest, dtype=torch.float64), exponents).clamp(min=info.tiny * info.eps)
    else:  # and those of codes and the eight digits of bfloat16
        scales = (largest / _MOST).to(torch.bfloat16).to(x.dtype)
        scales = torch.where(scales < _LEAST_SCALE, 0, scales)
    codes = torch.where(scales == 0, 0, x / torch.where(scales == 0, 1, scales)).round()
    return _Shrunk(codes.to(torch.int8), scales.to(torch.bfloat16).view(shape))


def _own_rows(
    key: str, x: torch.Tensor, start: ScaffoldTensor, tensor: Shrinkable, form: SaveDtype | None
) -> torch.Tensor | None:
    """Numbers of the rows that are not as drawn, `(n,)`; None where storing these alone would save nothing."""
    drawn = start.draw(x.dtype, x.device)
    own = _differing(x, drawn)
    if form is not None:  # also not those that become so by rounding: read and written again, they would be missing
        restored = _shrunk(key, x[own], tensor, form).restored().to(x.dtype)
        own = own[_differing(restored, drawn[own])]
    row = x[0].numel() * (FORMS[form] if form else x.dtype).itemsize
    return own if (len(x) - len(own)) * row > torch.int32.itemsize * len(own) + _ROWS_MUST_SAVE else None


def _differing(x: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """Numbers of the rows that are not the same to the bit, shape `(n,)`, int64."""
    bits = _SAME_SIZE[x.dtype.itemsize]
    return (x.contiguous().view(bits) != drawn.contiguous().view(bits)).flatten(1).any(1).nonzero().flatten()


class _Losses:
    """Sums of squares, of errors too, and the largest error, by group."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[float, float, float]] = {}

    def add(self, group: str, x: torch.Tensor, restored: torch.Tensor) -> None:
        squares, errors, largest = self.sums.get(group, (0.0, 0.0, 0.0))
        wide = torch.promote_types(x.dtype, torch.float32)
        squares += _norm(x, wide) ** 2
        if restored is not x:
            off = x.to(wide) - restored.to(wide)
            errors += _norm(off, wide) ** 2
            largest = max(largest, float(off.abs().max()))
        self.sums[group] = (squares, errors, largest)

    def of(self, group: str, before: Loss | None) -> Loss:
        squares, errors, largest = self.sums[group]
        if not errors and before is not None:
            return before
        relative = math.sqrt(errors / squares) if squares else 0.0
        return Loss(float(f"{relative:.3g}"), float(f"{largest:.3g}"))


def _norm(x: torch.Tensor, dtype: torch.dtype) -> float:
    norm = float(torch.linalg.vector_norm(x, dtype=dtype))
    return norm if math.isfinite(norm) else float(torch.linalg.vector_norm(x, dtype=torch.float64))


# ---- reading ---------------------------------------------------------------------------------------------------------


def file_shapes(plan: Plan, stored: Mapping[str, Any] | None, where: str) -> dict[str, tuple[int, ...]]:
    """Every key of an adapter file but the manifest, with its shape there.

    Args:
        plan: what is expected.
        stored: what the file's manifest says of the forms; None where tensors are as they are.
        where: what was looked at, the subject of the error's sentence.

    Raises:
        ArtifactError: that does not fit the plan.
    """
    shapes = plan.saved_shapes()
    if stored is None:
        return shapes
    shrinkable, tables = plan.shrinkable(), checked_tables(plan, stored, where)
    shapes |= {key: (table.rows, *shapes[key][1:]) for key, table in tables.items()}
    forms = checked_forms(plan, stored, where)
    scales = [math.prod(shrinkable[key].scales_of(shapes[key])) for key, form in forms.items() if form == "int8"]
    shapes |= {SCALES_KEY: (sum(scales),)} if scales else {}
    for key, parts in plan.stacked.items():
        sizes = [shapes.pop(part) for part in parts]
        shapes[key] = (len(parts), *sizes[0])
    return shapes | ({ROWS_KEY: (sum(table.rows for table in tables.values()),)} if tables else {})


def decoded(
    plan: Plan, stored: Mapping[str, Any] | None, tensors: Mapping[str, torch.Tensor], where: str
) -> dict[str, torch.Tensor]:
    """The tensors of an adapter file with these shapes, as the plan has them, in their own or a wider dtype.

    Raises:
        ArtifactError: numbers of rows are none.
    """
    found = {key: value for key, value in tensors.items() if key not in (MANIFEST_KEY, SCALES_KEY, ROWS_KEY)}
    if stored is None:
        return found
    for key, parts in plan.stacked.items():
        found |= dict(zip(parts, found.pop(key).unbind(), strict=True))
    shrinkable, at = plan.shrinkable(), 0
    for key, form in checked_forms(plan, stored, where).items():
        if form == "int8":
            shape = shrinkable[key].scales_of(tuple(found[key].shape))
            scales = tensors[SCALES_KEY][at : (at := at + math.prod(shape))]
            found[key] = _Shrunk(found[key], scales.view(shape)).restored()
    at = 0
    for key, table in checked_tables(plan, stored, where).items():
        own, size = tensors[ROWS_KEY][at : (at := at + table.rows)].long(), plan.saved_shapes()[key][0]
        if not bool(((own >= 0) & (own < size)).all()) or bool((own[1:] <= own[:-1]).any()):
            raise ArtifactError(
                f"{where}: {ROWS_KEY}: expected {table.rows} ascending numbers below {size}, of the rows of {key!r}, "
                f"found {own.tolist()[:5]} ... Nothing was loaded. Get the file again from where it came."
            )
        start = ScaffoldTensor(plan.saved[key.removeprefix(PREFIX)].name, plan.saved_shapes()[key], 0)
        found[key] = table.completed(start, own, found[key])
    return found
