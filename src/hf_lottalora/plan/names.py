"""What is said of names that match nothing: what was probably meant, and which layers there are."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

from .left_out import starred
from .survey import Survey


def near(name: str, paths: Iterable[str]) -> str:
    """` (did you mean ...?)` with the name in these paths that looks like it, "" where none does.

    Example:
        >>> near("q_porj", ["layers.0.q_proj", "layers.0.k_proj"])
        " (did you mean 'q_proj'?)"
    """
    close = _nearest(name, paths)
    return f" (did you mean {close!r}?)" if close else ""


def meant(given: str | Iterable[str], paths: Iterable[str]) -> str:
    """As `near`, for what `target_modules` and `exclude_modules` may be: names, or a regular expression.

    Example:
        >>> meant("q_proj", ["layers.0.q_proj", "layers.0.k_proj"])
        " (did you mean ['q_proj']? A string is a regular expression for whole paths)"
    """
    names, paths = [given] if isinstance(given, str) else sorted(given), list(paths)
    if given != "all-linear" and any(re.sub("[^a-z]", "", name.lower()) == "alllinear" for name in names):
        return " (did you mean the string 'all-linear'?)"
    if not isinstance(given, str):
        return next((guess for name in names if (guess := near(name, paths))), "")
    end = re.search(r"\w+(\.\w+)*$", given)
    if end is None or end[0] != given:
        return near(end[0], paths) if end else ""
    there = any(path == given or path.endswith(f".{given}") for path in paths)
    close = given if there else _nearest(given, paths)
    return f" (did you mean {[close]}? A string is a regular expression for whole paths)" if close else ""


def _nearest(name: str, paths: Iterable[str]) -> str | None:
    parts = name.count(".") + 1
    ends = {".".join(path.split(".")[-parts:]) for path in paths}
    return next(iter(get_close_matches(name, sorted(ends - {name}), n=1, cutoff=0.75)), None)


def layers_there_are(survey: Survey) -> str:
    """What to pass instead: a model's linear layers, or convolutions, or its head; and why others are no choice."""
    linear, convolutions = (starred(m.path for m in survey.modules if m.kind == kind) for kind in ("linear", "conv"))
    kind, names = ("linear layers", linear) if linear else ("convolutions", convolutions)
    advice = f"Pass target_modules; its {kind} are: {', '.join(names) or 'none'}."
    if names and all(m.in_head for m in survey.modules if m.kind in ("linear", "conv")):
        advice = f"Pass head='lora' to adapt its head alone ({', '.join(names)})."
    others = dict.fromkeys(f"{m.type_name} {m.reason}" for m in survey.modules if m.reason)
    return f"{advice} Without a choice: {'; '.join(others)}." if others else advice
