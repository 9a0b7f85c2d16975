"""`lottalora export`: an artifact as a checkpoint that transformers, or transformers and PEFT, load alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..tuner.export import export_dense
from ..tuner.export_lora import export_lora
from .outcome import Outcome


def export(path: str, folder: str, *, form: str, base_name: str | None = None, **options: Any) -> Outcome:
    """Write it.

    Args:
        path: a folder or a hub repository.
        folder: where to.
        form: "dense" or "lora".
        base_name: of the second.
        options: of `export_dense` and `export_lora`.

    Raises:
        ValueError: something cannot be exported so; the message names it. Nothing was written.
        OSError: it cannot be read or written; also where files are in the folder and `overwrite` is off.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if form == "dense":
        target = export_dense(path, folder, **given)
    else:
        target = export_lora(path, folder, base_name=base_name, **given)
    return Outcome(*written(path, target))


def written(path: str, target: Path) -> tuple[dict[str, Any], str]:
    """What lies in a folder now, as data and in words."""
    files = {file.relative_to(target).as_posix(): file.stat().st_size for file in _files(target)}
    total = sum(files.values())
    data = {"path": path, "folder": str(target), "files": files, "bytes": total}
    lines = [f"{size:>15,}  {name}" for name, size in files.items()]
    return data, "\n".join([*lines, f"{total:>15,}  bytes in {target}"])


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())
