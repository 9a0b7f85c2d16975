"""Writing an artifact so that the old one or the new one is there, whole, whatever happens meanwhile.

All is written into a hidden folder within the artifact's, on the same disk, and put in place when it is complete; how
that is read while files are put in place one by one, `current` says.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError

from ..plan.plan import Plan
from .current import PREFIX, hidden_folders, unfinished, weights_digest
from .files import check_not_pickled

# A hidden folder in which nothing has changed for so long was left by a save that was killed.
ABANDONED_AFTER = 3600.0  # seconds
CARD = "README.md"


@contextmanager
def staged(
    save_directory: str | os.PathLike[str], plans: Mapping[str, Plan], needed: int | None = None
) -> Iterator[str]:
    """A folder to write an artifact into. It becomes `save_directory` at the end; after an error, nothing has changed.

    Files there that the new artifact does not have stay, such as a tokenizer.

    Args:
        save_directory: created where it is missing.
        plans: of the adapters that are written, by name; all but "default" have a folder of that name in it.
        needed: bytes that are written, by default those of these plans.

    Raises:
        ValueError: pickled weights are there.
        OSError: the folder cannot be written, or the disk is full; the error says how many bytes are needed.
    """
    target = Path(save_directory)
    folders = ["" if name == "default" else name for name in plans]
    for folder in folders:
        check_not_pickled(target / folder)
    made = [path for path in (target, *target.parents) if not path.exists()]
    token = uuid.uuid4().hex[:8]
    stage = target / f"{PREFIX}{token}"
    try:
        target.mkdir(parents=True, exist_ok=True)
        for folder in ("", *folders):
            _tidy(target / folder)
        try:
            stage.mkdir()
            for folder in {"", *folders}:  # a user's words on the card are kept
                if (target / folder / CARD).exists():
                    (stage / folder).mkdir(exist_ok=True)
                    shutil.copyfile(target / folder / CARD, stage / folder / CARD)
            yield str(stage)
            parts = {path: _complete(path) for path in (*(p for p in stage.rglob("*") if p.is_dir()), stage)}
        except Exception as error:
            if not _is_of_a_full_disk(error):
                raise
            shutil.rmtree(stage, ignore_errors=True)
            if needed is None:
                needed = sum(plan.artifact_bytes() for plan in plans.values())
            raise OSError(
                errno.ENOSPC,
                f"No space left on the device: what is written needs about {needed:,} bytes beside what it replaces, "
                f"{shutil.disk_usage(target).free:,} are free. What was in the folder is unchanged. Free some space, "
                "or save elsewhere",
                str(target),
            ) from error
        for path, digest in parts.items():
            _publish(path, target / path.relative_to(stage), f"{PREFIX}{digest}-{token}")
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        for path in made:
            with suppress(OSError):  # somebody else's files are in it
                path.rmdir()
        raise
    shutil.rmtree(stage, ignore_errors=True)


def check_empty(folder: str | os.PathLike[str], overwrite: bool) -> Path:
    """The folder, if it can be written to: there is none yet or nothing in it, or `overwrite` is on.

    Raises:
        FileExistsError: it has files, or is one.
    """
    target = Path(folder)
    if target.is_file():
        raise FileExistsError(f"{target} is a file, expected a folder to write to. Nothing was written.")
    if not overwrite and target.is_dir() and any(target.iterdir()):
        raise FileExistsError(
            f"{target} is not empty. Nothing was written. Take another folder, or pass overwrite=True (--force)."
        )
    return target


def _is_of_a_full_disk(error: Exception) -> bool:
    if isinstance(error, SafetensorError):
        return f"(os error {errno.ENOSPC})" in str(error)
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None))


def _complete(folder: Path) -> str | None:
    """Make sure that what was written is on the disk and can be read by whom the umask says.

    Returns:
        The digest of the weights, None where there are none.
    """
    weights, config = folder / SAFETENSORS_WEIGHTS_NAME, folder / CONFIG_NAME
    if weights.exists() and config.exists():  # which safetensors makes for its owner alone
        mode = stat.S_IMODE(config.stat().st_mode)
        if stat.S_IMODE(weights.stat().st_mode) != mode:
            weights.chmod(mode)
    for file in folder.iterdir():
        if file.is_file():
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())
    _sync(folder)
    return weights_digest(folder) if weights.exists() else None


def _sync(folder: Path) -> None:
    if os.name == "nt":  # where folders cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of file systems that do not sync folders
            raise
    finally:
        os.close(descriptor)


def _publish(source: Path, target: Path, hidden: str) -> None:
    """Put the files of one folder in place."""
    target.mkdir(exist_ok=True)
    with _lock(target):
        _roll_forward(target)
        ready = target / hidden
        try:
            source.rename(ready)
            _sync(target)
            if (ready / SAFETENSORS_WEIGHTS_NAME).exists():
                if not (target / CONFIG_NAME).exists():  # the first one here, which PEFT finds by this file's name
                    _move(ready, target, last=SAFETENSORS_WEIGHTS_NAME)
                    _sync(target)
                (ready / SAFETENSORS_WEIGHTS_NAME).replace(target / SAFETENSORS_WEIGHTS_NAME)
                _sync(target)
            _move(ready, target)
            _sync(target)
        except BaseException:
            if (ready / SAFETENSORS_WEIGHTS_NAME).exists():  # the old one counts; else it is read from both folders
                shutil.rmtree(ready, ignore_errors=True)
            raise


def _move(source: Path, target: Path, last: str | None = None) -> None:
    """Move all files but the last one, and remove the folder when none is left."""
    for file in sorted(source.iterdir()):
        if file.name != last:
            with suppress(FileNotFoundError):  # where locks do not work, another save has moved it
                file.replace(target / file.name)
    if last is None:
        with suppress(FileNotFoundError):
            source.rmdir()


def _roll_forward(folder: Path) -> None:
    """Finish a save that was killed after its weights were in place."""
    for path in unfinished(folder):
        _move(path, folder)


def _tidy(folder: Path) -> None:
    """Finish or remove what saves left that were killed; not what another one is writing now."""
    if not hidden_folders(folder):
        return
    with _lock(folder):
        _roll_forward(folder)
    for path in hidden_folders(folder):
        with suppress(OSError):  # it is being moved
            if time.time() - max(p.stat().st_mtime for p in (path, *path.rglob("*"))) > ABANDONED_AFTER:
                shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One process or thread of this machine at a time. The lock is a file in the temporary directory."""
    name = hashlib.sha256(os.path.realpath(folder).encode()).hexdigest()[:32]
    with ExitStack() as stack:
        # Where none can be made (a read-only temporary directory, another user's file) and between machines it goes
        # without: two saves at the same moment can then leave files of both, which are refused when they are loaded.
        with suppress(OSError, NotImplementedError):
            stack.enter_context(FileLock(Path(tempfile.gettempdir(), f"hf_lottalora-{name}.lock"), mode=0o666))
        yield
