"""`lottalora push` and `lottalora pull`: an artifact to the hub and from it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ..artifact.companions import companions
from ..artifact.files import check_not_pickled, check_present, locate
from ..artifact.hub import CLIENT_ERROR
from ..artifact.loading import load_model
from ..artifact.publish import FILES, push_folder
from ..artifact.reader import ArtifactError
from ..artifact.writing import check_empty, staged
from .export import written
from .opened import artifact_folder, read_config
from .outcome import Outcome


def push(
    folder: str, repo_id: str, *, subfolder: str | None, base_model: bool | str | None = None, **options: Any
) -> Outcome:
    """Push a saved artifact: exactly its files, in one commit, with a card that loads them from there.

    Args:
        folder: where it was saved.
        repo_id: made where there is none.
        subfolder: of the folder, and of the repository: that of another adapter than "default".
        base_model: as `AutoLottaLoraModelFor....from_pretrained` takes it.
        options: of `publish.push_folder`.

    Raises:
        ArtifactError, ValueError: it is no artifact, or damaged.
        OSError: the hub refuses it, or cannot be reached.
    """
    if not Path(folder).is_dir():
        raise ArtifactError(f"There is no folder {folder!r}, expected one made by save_pretrained.")
    check_present(folder, subfolder)
    name = subfolder or "default"
    model = load_model(folder, subfolder=subfolder, adapter_name=name, residency="streamed", base_model=base_model)
    try:
        commit = push_folder(model, folder, repo_id, adapters=[name], **options)
    except CLIENT_ERROR as error:
        if isinstance(error, OSError):
            raise
        raise OSError(f"{repo_id} could not be reached: {error}. Nothing is sure to have been pushed.") from error
    data = {"folder": folder, "repo": repo_id, "commit": commit.oid, "url": commit.commit_url, "pr": commit.pr_url}
    return Outcome(data, str(commit.pr_url or commit.commit_url))


def pull(repo_id: str, folder: str, *, expect: str | None = None, overwrite: bool = False, **where: Any) -> Outcome:
    """Fetch an artifact's files, all of one commit, check them, and put them into a folder, whole or not at all.

    Args:
        repo_id: on the hub; a folder here is copied.
        folder: where to.
        expect: the digest that it should have.
        overwrite: take a folder with files; others than these stay.
        where: `subfolder`, `revision`, `token`.

    Returns:
        What was found; it has not passed where the digest is another one, and then nothing was written.

    Raises:
        ArtifactError, ValueError: it is no artifact, or damaged. Nothing was written.
        OSError: the hub refuses it or cannot be reached, or the folder cannot be written or has files.
    """
    target = check_empty(folder, overwrite)
    check_not_pickled(target)
    source, hub = artifact_folder(repo_id, **where)
    found = (read_config(source)._artifact_manifest or {}).get("artifact")
    about = {"commit": hub.get("revision"), "digest": found, "expected": expect}
    if expect is not None and found != expect:
        reason = f"{repo_id} has the digest {found}, expected {expect}. Nothing was written."
        return Outcome({"path": repo_id, "folder": None, "files": {}, "bytes": 0, **about}, reason, passed=False)
    names = [locate(repo_id, name, where.get("subfolder"), **hub) for name in FILES]
    files = [*(Path(name) for name in names if name), *companions(repo_id, where.get("subfolder"), **hub)]
    with staged(target, {}, sum(file.stat().st_size for file in files)) as stage:
        for file in files:
            shutil.copyfile(file, Path(stage, file.name))
    data, text = written(repo_id, target)
    return Outcome({**data, **about}, f"{text}\ndigest {found}")
