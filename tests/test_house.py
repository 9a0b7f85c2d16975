"""The house keeps its order: a file imports from its own wing and from those below, never in a circle.

Imports under TYPE_CHECKING and inside functions count. `__init__`, `__main__` and `_registry` stand outside:
they import everything.
"""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "hf_lottalora"
# From the ground up.
WINGS = [
    "paths",
    "scaffold",
    "options",
    "residency",
    "recorded",
    "config",
    "layers",
    "plan",
    "artifact",
    "tuner",
    "experiments",
    "cli",
]
OUTSIDE = {"__init__", "__main__", "_registry"}


def imports(file: Path, root: Path = SOURCE) -> set[str]:
    """Dotted names, below the package, of the modules that this file imports."""
    package = list(file.relative_to(root).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("hf_lottalora")):
            module = (node.module or "").removeprefix("hf_lottalora").strip(".").split(".") if node.module else []
            base = [*package[: len(package) - node.level + 1], *module] if node.level else module
            for alias in node.names:
                path = root.joinpath(*base, alias.name)
                named = [*base, alias.name] if path.is_dir() or path.with_suffix(".py").is_file() else base
                found.add(".".join(named))
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("hf_lottalora.") for a in node.names if a.name.startswith("hf_lottalora.")}
    return found


def arrows(root: Path = SOURCE) -> dict[str, set[str]]:
    files = {
        ".".join(p.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): p for p in root.rglob("*.py")
    }
    return {name: imports(file, root) & files.keys() for name, file in files.items() if name not in OUTSIDE}


def upward(found: dict[str, set[str]], wings: list[str] = WINGS) -> list[str]:
    height = {wing: level for level, wing in enumerate(wings)}
    return [
        f"{name} imports {other}"
        for name, others in found.items()
        for other in others
        if height[other.partition(".")[0]] > height[name.partition(".")[0]]
    ]


def test_arrows_point_downwards() -> None:
    found = arrows()
    assert {name.partition(".")[0] for name in found} == set(WINGS)
    assert upward(found) == []


def test_there_is_no_circle() -> None:
    tuple(TopologicalSorter(arrows()).static_order())


def test_both_would_be_seen(tmp_path: Path) -> None:
    (tmp_path / "low").mkdir()
    (tmp_path / "low" / "a.py").write_text("def f():\n    from ..high import b\n")
    (tmp_path / "high.py").write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .low.a import f\n")
    found = arrows(tmp_path)
    assert found == {"low.a": {"high"}, "high": {"low.a"}}
    assert upward(found, ["low", "high"]) == ["low.a imports high"]
    with pytest.raises(CycleError):
        tuple(TopologicalSorter(found).static_order())
