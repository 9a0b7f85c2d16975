"""What a command has found, as data and in words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


class WrongUsageError(ValueError):
    """Options that cannot be meant."""

    exit_code = 2


@dataclass(frozen=True)
class Outcome:
    """What a command has found.

    Attributes:
        data: what `json.dumps` takes.
        text: the same for people.
        passed: False where a check has failed, or two things differ.
    """

    data: dict[str, Any]
    text: str
    passed: bool = True


def table(rows: Mapping[str, Any]) -> str:
    """Lines of names and values; without those that are None."""
    shown = {name: value for name, value in rows.items() if value is not None}
    width = max(map(len, shown), default=0)
    return "\n".join(f"{name:<{width}}  {_shown(value)}" for name, value in shown.items())


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def grouped(names: Iterable[str]) -> dict[str, list[str]]:
    """Names by what they are with stars in the place of layer numbers."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"\.\d+(?=\.)", ".*", name), []).append(name)
    return groups
