"""Which files of an artifact's folder belong together, also while it is written and where that was cut short.

Several files cannot be replaced at once, so the weights decide. A save puts all its files into a hidden folder that has
the digest of its weights in its name, moves the weights out of it, and then the others: until they have followed, they
are read there. Nothing is written here, so that it works in folders that cannot be.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

PREFIX = ".lottalora-"
ATTEMPTS = 5

T = TypeVar("T")


def hidden_folders(folder: Path) -> list[Path]:
    """What saves have in the folder, while they go on or since they were killed."""
    try:
        return [folder / name for name in os.listdir(folder) if name.startswith(PREFIX)]
    except OSError:  # none there, or none that may be listed
        return []


def weights_digest(folder: Path) -> str:
    """Of the folder's `adapter_model.safetensors`, by all its bytes."""
    with (folder / SAFETENSORS_WEIGHTS_NAME).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def unfinished(folder: Path) -> list[Path]:
    """Folders of saves (one at most, but for lost locks) that have put these weights in place, not yet all the rest."""
    found = [path for path in hidden_folders(folder) if not (path / SAFETENSORS_WEIGHTS_NAME).exists()]
    if not found or not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        return []
    start = f"{PREFIX}{weights_digest(folder)}-"
    return [path for path in found if path.name.startswith(start)]


def current(folder: Path, name: str) -> Path:
    """The file of this name that belongs to the folder's weights; it need not exist."""
    if name != SAFETENSORS_WEIGHTS_NAME:
        for path in unfinished(folder):
            if (path / name).is_file():
                return path / name
    return folder / name


def whole(load: Callable[[], T], path: str | os.PathLike[str], subfolder: str | None = None) -> T:
    """What `load` returns, called again where the folder was saved to meanwhile: old and new are never mixed.

    Raises:
        OSError: it was saved to each time.
    """
    folder = Path(path, subfolder or "")
    if not folder.is_dir():  # on the hub
        return load()
    for _ in range(ATTEMPTS):
        before = _state(folder)
        try:
            result = load()
        except Exception:  # whatever the halves of two saves lead to, SafetensorError too
            if _state(folder) == before:
                raise
        else:
            if _state(folder)[0] == before[0]:
                return result
    raise OSError(
        f"{folder} was saved to while it was loaded, {ATTEMPTS} times in a row, so what was read does not belong "
        "together. Load it when that has ended, or from a copy."
    )


def _state(folder: Path) -> list[Any]:
    """Of the weights first: another one after each save."""
    state: list[Any] = []
    for name in (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME, "config.json"):
        try:
            found = (folder / name).stat()
        except OSError:
            state.append(None)
        else:
            state.append((found.st_ino, found.st_size, found.st_mtime_ns))
    return state
