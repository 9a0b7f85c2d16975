"""What a manifest says of the forms of tensors in its file, compared with the plan before anything is made of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ..options import SaveDtype, check_types
from ..plan.plan import Plan, saved_key
from ..plan.storage import form_in, names_of
from ..scaffold.draw import check_seed
from ..scaffold.families import get_family
from ..scaffold.tensor import ScaffoldTensor
from .reader import ArtifactError

_STORED: dict[str, Any] = {
    "dtype": SaveDtype | None,
    "forms": dict[str, SaveDtype],
    "tables": dict[str, dict[str, Any]],
    "loss": dict[str, list[float]],
}
_TABLE: dict[str, Any] = {
    "rows": int, "dtype": str, "seed": Any, "family": str, "scale": float, "zero_row": int | None,
}  # fmt: skip


class Table(NamedTuple):
    """A drawn embedding of which some rows are stored. How the others are drawn is said whole: the model that it is
    loaded into may start its own otherwise.

    Attributes:
        rows: how many are stored.
        dtype: its own, in which the others are drawn.
        seed, family, scale, zero_row: of the draw.
    """

    rows: int
    dtype: str
    seed: int
    family: str
    scale: float
    zero_row: int | None

    @classmethod
    def of(cls, rows: int, dtype: torch.dtype, start: ScaffoldTensor) -> Table:
        """The same, of a table that is saved."""
        name = str(dtype).removeprefix("torch.")
        return cls(rows, name, start.seed, start.family, start.scale, start.zero_row)

    def completed(self, start: ScaffoldTensor, rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """All rows: these values `(n, ...)` at these numbers `(n,)`, the others drawn by the name of `start`."""
        draw = replace(start, seed=self.seed, family=self.family, scale=self.scale, zero_row=self.zero_row)
        dtype: torch.dtype = getattr(torch, self.dtype)
        table = draw.draw(dtype, values.device)  # all of it: to draw single rows takes longer
        table[rows.to(values.device).long()] = values.to(dtype)
        return table


def checked_forms(plan: Plan, stored: Mapping[str, Any], where: str) -> dict[str, SaveDtype | None]:
    """The form of each tensor that can have one, in the order of their keys.

    Raises:
        ArtifactError: it is damaged, or names what cannot have the form.
    """
    _check_stored(plan, stored, where)
    said, shrinkable = stored["forms"], plan.shrinkable()
    _check_known(said, (name for key in shrinkable for name in names_of(key)), where, "stored.forms")
    forms = {key: form_in(said, key) for key in sorted(shrinkable)}
    for key, form in forms.items():
        if form == "int8" and shrinkable[key].scales is None:
            raise _refused(f"{where}: stored.forms: expected float16, bfloat16 or none for {key!r}, found int8")
    for group, errors in stored["loss"].items():
        if len(errors) != 2:
            raise _refused(f"{where}: stored.loss: expected two numbers for {group!r}, found {errors!r}")
    return forms


def checked_tables(plan: Plan, stored: Mapping[str, Any], where: str) -> dict[str, Table]:
    """The tables of which some rows are stored, in the order of their keys.

    Raises:
        ArtifactError: it is damaged, or names what is no table of this size.
    """
    _check_stored(plan, stored, where)
    sizes = {saved_key(t.path): t.survey.shape[0] for t in plan.with_role("trained") if t.survey.kind == "embedding"}
    _check_known(stored["tables"], sizes, where, "stored.tables")
    tables = {}
    for key, fields in sorted(stored["tables"].items()):
        place = f"stored.tables[{key!r}]"
        _check_fields(fields, _TABLE, where, place)
        table = tables[key] = Table(**fields)
        try:
            check_seed(table.seed)
            get_family(table.family)
        except (TypeError, ValueError) as error:
            raise _refused(f"{where}: {place}: {error}") from error
        dtype = getattr(torch, table.dtype, None)
        for field, fits in {
            "rows": 0 <= table.rows <= sizes[key],
            "dtype": isinstance(dtype, torch.dtype) and dtype.is_floating_point,
            "family": get_family(table.family).exact,
            "scale": 0 < table.scale < 1e30,
            "zero_row": table.zero_row is None or 0 <= table.zero_row < sizes[key],
        }.items():
            if not fits:
                raise _refused(
                    f"{where}: {place}.{field}: expected one of a table of {sizes[key]} rows, "
                    f"found {getattr(table, field)!r}"
                )
    return tables


def _check_stored(plan: Plan, stored: Mapping[str, Any], where: str) -> None:
    stacked = sorted(plan.stacked)
    _check_fields(stored, {**_STORED, **({"stacked": list[str]} if stacked else {})}, where, "stored")
    if stacked != stored.get("stacked", []):
        raise _refused(f"{where}: stored.stacked: expected {stacked}, found {stored.get('stacked')}")


def _check_fields(found: Mapping[str, Any], expected: Mapping[str, Any], where: str, place: str) -> None:
    if found.keys() != expected.keys():
        raise _refused(f"{where}: {place}: expected {sorted(expected)}, found {sorted(found)}")
    try:
        check_types(found, expected)
    except ValueError as error:
        raise _refused(f"{where}: {place}: {error}") from error


def _check_known(found: Iterable[str], known: Iterable[str], where: str, place: str) -> None:
    if unknown := sorted(set(found) - set(known)):
        raise _refused(f"{where}: {place}: expected tensors that this model saves so, found {unknown[0]!r}")


def _refused(problem: str) -> ArtifactError:
    return ArtifactError(f"{problem}. Nothing was loaded. Get the file again from where it came.")
