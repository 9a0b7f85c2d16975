"""What the commands are given: a folder here, or a repository on the hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME

from ..artifact.files import check_present
from ..artifact.hub import local_copy, pinned
from ..artifact.reader import ArtifactError
from ..config import LottaLoraConfig


def artifact_folder(
    path: str, subfolder: str | None = None, revision: str | None = None, token: str | None = None
) -> tuple[Path, dict[str, Any]]:
    """The folder with an artifact's files, fetched where it is one of the hub.

    Returns:
        The folder; and what else reads the same files from `path`: of the hub, `revision` = their commit, and `token`.

    Raises:
        ArtifactError: there is no adapter.
        OSError: the hub has no such repository, or cannot be reached; the message says which.
    """
    if os.path.exists(path):
        if not Path(path).is_dir():
            raise ArtifactError(f"{path} is a file, expected an artifact's folder, or the name of a hub repository.")
        check_present(path, subfolder)
        return Path(path, subfolder or ""), {}
    given = {"revision": revision, "token": token}
    hub = pinned(path, subfolder, **{name: value for name, value in given.items() if value is not None})
    folder = local_copy(path, subfolder, **hub)
    if folder is None:
        where = f"{subfolder}/{CONFIG_NAME}" if subfolder else CONFIG_NAME
        raise ArtifactError(f"{path} has no {where} with weights beside it; expected an artifact of save_pretrained.")
    return folder, hub


def read_config(folder: Path) -> LottaLoraConfig:
    """The config of an artifact all of whose files have been compared with its manifest.

    Raises:
        ValueError: a file is damaged or changed, or of another method; the message names it.
    """
    config: Any = LottaLoraConfig.from_pretrained(folder)
    if not isinstance(config, LottaLoraConfig):
        raise ArtifactError(f"{folder} is a {config.peft_type.value} adapter, expected LOTTALORA.")
    return config
