"""Which module a pattern or a path means, by PEFT's rules of matching."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft.utils.other import get_pattern_key

from ..config import LottaLoraConfig


def by_pattern(config: LottaLoraConfig, name: str, path: str, default: Any) -> Any:
    """The value of a pattern for the module at this path, by PEFT's rules of matching.

    Raises:
        ValueError: several keys match and disagree. adapter_config.json sorts them, so their order cannot decide.
    """
    pattern = getattr(config, name) or {}
    matching = [key for key in pattern if get_pattern_key([key], path) == key]
    if len({repr(pattern[key]) for key in matching}) > 1:
        raise ValueError(
            f"{name} has several keys for {path!r}, which disagree: {matching}. Make each module match one."
        )
    return pattern[matching[0]] if matching else default


def under(path: str, modules: set[str]) -> bool:
    """Whether the path is one of the modules or lies in one."""
    return path in modules or any(parent in modules for parent in parents(path))


def parents(path: str) -> Iterator[str]:
    """The paths that contain this one, the longest first."""
    while "." in path:
        path = path.rpartition(".")[0]
        yield path
