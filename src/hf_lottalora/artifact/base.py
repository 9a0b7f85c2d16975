"""Which pretrained base model an artifact is loaded over, and whether it may be fetched."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..config import LottaLoraConfig

# Of base models safetensors are read only, and no code of theirs is run.
UNASKED = {"use_safetensors": True, "trust_remote_code": False}


@contextmanager
def reading_base(base: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """While the base model of an artifact is read.

    Raises:
        ValueError: it cannot be; the message says why.
    """
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"The base model {base!r} of {path} could not be read: {error} Of base models safetensors are read only; "
            "load another kind yourself and use PeftModel.from_pretrained(model, path)."
        ) from error


def base_of(
    config: LottaLoraConfig, path: str | os.PathLike[str], base_model: bool | str | os.PathLike[str] | None
) -> tuple[str, str | None]:
    """Name or path, and revision, of the base model of an artifact that keeps pretrained weights.

    Args:
        config: the artifact's.
        path: the artifact's folder, or its repository on the hub.
        base_model: what the user says: another name or path, True for whatever the artifact names, False for none.
            None: what a folder names, and what a repository names where that is a folder here or a commit is pinned.

    Raises:
        TypeError: it is none of these.
        ValueError: the artifact names none, or the user was not asked.
    """
    named = config.base_model_name_or_path
    if not isinstance(base_model, (bool, str, os.PathLike, type(None))):
        raise TypeError(
            f"base_model must be a name or path, or True for what the artifact names, got {type(base_model).__name__}. "
            "Over a model that you have: PeftModel.from_pretrained(model, path)."
        )
    if not isinstance(base_model, (bool, type(None))):
        chosen = os.fspath(base_model)
        return chosen, config.revision if chosen == named else None
    advice = "Load that model yourself and use PeftModel.from_pretrained(model, path)"
    if not named:
        raise ValueError(
            f"{path} keeps pretrained weights (redraw={config.redraw!r}) but names no base model. {advice}, or pass "
            "base_model='name or path'."
        )
    pinned = re.fullmatch(r"[0-9a-f]{40}", config.revision or "") is not None
    if not base_model and (base_model is False or not (Path(path).is_dir() or Path(named).is_dir() or pinned)):
        raise ValueError(
            f"{path} was made over the base model {named!r} (revision {config.revision!r}), which was not fetched: "
            "what a downloaded artifact names is fetched only if it names a commit, or you say so. If you trust it, "
            "pass base_model=True, or another name or path, to AutoLottaLoraModelFor....from_pretrained. Or: "
            f"{advice[0].lower()}{advice[1:]}."
        )
    return named, config.revision
