"""`lottalora diff`: in what two artifacts differ."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..artifact.files import read_weights
from ..plan.plan import MANIFEST_KEY
from .opened import artifact_folder, read_config
from .outcome import Outcome

# Of a manifest: what it says of the whole, beside options, architecture and tensors.
_FACTS = ("class", "seed", "format_version", "generator", "residual", "scaling", "rows", "trained")


def diff(first: str, second: str, **where: Any) -> Outcome:
    """Compare two artifacts, whose files are checked first.

    Args:
        first: a folder or a hub repository.
        second: likewise.
        where: `subfolder`, `revision` and `token`, each either for both or, with `_second` behind it, for the second.

    Raises:
        ArtifactError, ValueError, OSError: one of them cannot be read.
    """
    names = ("subfolder", "revision", "token")
    its = {name: where.get(f"{name}_second") or where.get(name) for name in names}
    folders = [
        artifact_folder(first, **{name: where.get(name) for name in names})[0],
        artifact_folder(second, **its)[0],
    ]
    for folder in folders:
        read_config(folder)
    (one, _, mine), (other, _, theirs) = (read_weights(folder) for folder in folders)
    data: dict[str, Any] = {
        "first": {"path": first, "digest": mine.get("artifact")},
        "second": {"path": second, "digest": theirs.get("artifact")},
        "facts": _changes({key: mine.get(key) for key in _FACTS}, {key: theirs.get(key) for key in _FACTS}),
        "options": _changes(mine.get("options") or {}, theirs.get("options") or {}),
        "architecture": _changes(_values(mine), _values(theirs)),
        "scaffold": _names(mine["scaffold"], theirs["scaffold"]),
        "base_model": _names(mine["kept"], theirs["kept"]),
        "tensors": _tensors(one, other),
    }
    parts = [data[key] for key in ("facts", "options", "architecture", "scaffold", "base_model")]
    same = not any([*parts, *data["tensors"].values()])
    return Outcome({"same": same, **data}, _text(same, data), passed=same)


def _changes(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, list[Any]]:
    keys = sorted(mine.keys() | theirs.keys())
    return {key: [mine.get(key), theirs.get(key)] for key in keys if mine.get(key) != theirs.get(key)}


def _values(content: Mapping[str, Any]) -> dict[str, Any]:
    return _flat((content.get("architecture") or {}).get("values"))


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {path: value} if path else {}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found.update(_flat(inner, f"{path}.{key}" if path else key))
    return found


def _names(mine: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    return sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))


def _tensors(one: str | Path, other: str | Path) -> dict[str, list[Any]]:
    """Names that one file has alone, and how much the others differ."""
    with safe_open(one, framework="pt") as first, safe_open(other, framework="pt") as second:
        mine, theirs = (set(file.keys()) - {MANIFEST_KEY} for file in (first, second))
        differ = []
        for name in sorted(mine & theirs):
            a, b = first.get_tensor(name), second.get_tensor(name)
            if a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(-1).view(torch.uint8), _bytes(b)):
                continue
            entry = {"name": name, "shapes": [list(a.shape), list(b.shape)], "dtypes": [_dtype(a), _dtype(b)]}
            differ.append({**entry, **_distance(a, b)})
    return {"only_in_first": sorted(mine - theirs), "only_in_second": sorted(theirs - mine), "differ": differ}


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _distance(a: torch.Tensor, b: torch.Tensor) -> dict[str, float | None]:
    """The largest difference, and the norm of the difference over that of the first; None where there is none."""
    if a.shape != b.shape or not a.numel():
        return {"largest": None, "relative": None}
    a, b = a.double(), b.double()
    size, change = torch.linalg.vector_norm(a).item(), torch.linalg.vector_norm(b - a).item()
    values = {"largest": (b - a).abs().max().item(), "relative": change / size if size else math.inf}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _text(same: bool, data: dict[str, Any]) -> str:
    if same:
        return f"{data['first']['path']} and {data['second']['path']} are the same."
    lines = [f"--- {data['first']['path']}  {data['first']['digest']}"]
    lines.append(f"+++ {data['second']['path']}  {data['second']['digest']}")
    for part in ("facts", "options", "architecture"):
        lines += [f"{part}: {key}: {_brief(mine)} -> {_brief(theirs)}" for key, (mine, theirs) in data[part].items()]
    for part, what in (("scaffold", "is drawn otherwise"), ("base_model", "is of another base model")):
        lines += [f"{part}: {name} {what}" for name in data[part]]
    lines += [f"tensors: {name} only in the first" for name in data["tensors"]["only_in_first"]]
    lines += [f"tensors: {name} only in the second" for name in data["tensors"]["only_in_second"]]
    for entry in data["tensors"]["differ"]:
        shapes, dtypes = entry["shapes"], entry["dtypes"]
        if shapes[0] != shapes[1]:
            how = f"{shapes[0]} -> {shapes[1]}"
        else:
            how = f"largest difference {_figure(entry['largest'])}, relative {_figure(entry['relative'])}"
            how += f", {dtypes[0]} -> {dtypes[1]}" if dtypes[0] != dtypes[1] else ""
        lines.append(f"tensors: {entry['name']}: {how}")
    return "\n".join(lines)


def _brief(value: Any) -> str:
    return reprlib.aRepr.repr(value)


def _figure(value: float | None) -> str:
    return "without a number" if value is None else f"{value:.4g}"
