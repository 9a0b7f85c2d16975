"""Writing to the hub: exactly an artifact's files, in one commit, with a card that loads them from there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from .card import card_text
from .card_parts import Parts, split
from .hub import download

_CARD = "README.md"
FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, "config.json", _CARD)


def push_model(model: Any, repo_id: str, *, max_shard_size: Any = None, **options: Any) -> Any:
    """`PeftModel.push_to_hub` of a LottaLoRA model: save it aside, and push that; there are no shards."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return push_folder(model, folder, repo_id, **options)


def push_folder(
    model: Any,
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    adapters: Iterable[str] | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: Iterable[str] | None = None,
) -> Any:
    """Push the artifacts that a model was just saved to, one for each adapter.

    Args:
        model: the `PeftModel`.
        folder: where it was saved.
        repo_id: repository on the hub, made where there is none.
        adapters: which were saved, all by default.
        commit_message: of the one commit.
        commit_description: the same.
        private: of a repository that is made.
        token: as everywhere in huggingface_hub.
        revision: branch, made where there is none.
        create_pr: open a pull request instead.
        tags: further ones, for the card.

    Returns:
        huggingface_hub's `CommitInfo`.

    Raises:
        HfHubHTTPError: the hub refuses it.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        try:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        except HfHubHTTPError as error:
            if not (create_pr and error.response.status_code == 403):  # else its owner must have made it
                raise
    branch = None if create_pr or revision == "main" else revision
    operations = []
    for name in model.peft_config if adapters is None else adapters:
        subfolder = None if name == "default" else name
        here = Path(folder, subfolder or "")
        there = f"{subfolder}/" if subfolder else ""
        there_now = download(repo_id, there + _CARD, revision=revision, token=token, force_download=True)
        old = _older(_read(here / _CARD), there_now and _read(Path(there_now)))
        text = card_text(
            model.base_model.plans[name], here, old, tags or (), path=repo_id, revision=branch, subfolder=subfolder
        )
        operations += [
            CommitOperationAdd(there + file, text.encode() if file == _CARD else str(here / file))
            for file in FILES
            if file == _CARD or (here / file).is_file()
        ]
    return api.create_commit(
        repo_id,
        operations,
        commit_message=commit_message or "Upload LottaLoRA adapter",
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
    )


def _read(file: Path) -> str | None:
    return file.read_text(encoding="utf-8-sig") if file.is_file() else None


def _older(saved: str | None, pushed: str | None) -> Parts:
    """The card to go on from: the one in the folder, if a user wrote in it, else the one on the hub."""
    here, there = split(saved), split(pushed)
    if here.words or pushed is None:
        return here
    if here.trainer:
        there.add_trainers(here)
    return there
