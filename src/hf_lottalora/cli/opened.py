"""What the commands are given: a folder here, or a repository on the hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME

from ..artifact.files import check_present, locate
from ..artifact.hub import local_copy, pinned
from ..artifact.reader import ArtifactError, read_json
from ..config import LottaLoraConfig
from ..scaffold.families import FAMILIES


def artifact_folder(
    path: str, subfolder: str | None = None, revision: str | None = None, token: str | None = None
) -> tuple[Path, dict[str, Any]]:
    """The folder with an artifact's files, fetched where it is one of the hub.

    Returns:
        The folder; and what else reads the same files from `path`: of the hub, `revision` = their commit, and `token`.

    Raises:
        ArtifactError: there is no adapter, or it is of a family that is not known here.
        OSError: the hub has no such repository, or cannot be reached; the message says which.
    """
    if not path:
        raise ArtifactError("Expected an artifact's folder or the name of a hub repository, got an empty name.")
    if os.path.exists(path):
        check_present(path, subfolder)
        here = Path(path, subfolder or "")
        _check_families(here)
        return here, {}
    given = {"revision": revision, "token": token}
    hub = pinned(path, subfolder, **{name: value for name, value in given.items() if value is not None})
    folder = local_copy(path, subfolder, **hub)
    if folder is None:
        where = f"{subfolder}/{CONFIG_NAME}" if subfolder else CONFIG_NAME
        raise ArtifactError(f"{path} has no {where} with weights beside it; expected an artifact of save_pretrained.")
    _check_families(folder)
    return folder, hub


def _check_families(folder: Path) -> None:
    file = locate(folder, CONFIG_NAME)
    content = {} if file is None else read_json(file)
    pattern = content.get("family_pattern")
    used = [content.get("family"), *(pattern.values() if isinstance(pattern, dict) else ())]
    own = [name for name in used if isinstance(name, str) and name not in FAMILIES]
    if content.get("peft_type") == "LOTTALORA" and own:
        raise ArtifactError(
            f"{folder} is of family {own[0]!r}, which is not registered here, so nothing can be said of it. If "
            "a module registers it, name that before the command: lottalora --import MODULE ..."
        )


def read_config(folder: Path) -> LottaLoraConfig:
    """The config of an artifact all of whose files have been compared with its manifest.

    Raises:
        ValueError: a file is damaged or changed, or of another method; the message names it.
    """
    config: Any = LottaLoraConfig.from_pretrained(folder)
    if not isinstance(config, LottaLoraConfig):
        raise ArtifactError(f"{folder} is a {config.peft_type.value} adapter, expected LOTTALORA.")
    return config
