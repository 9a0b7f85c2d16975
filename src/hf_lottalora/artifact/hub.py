"""Reading from the hub: one commit for all files of an artifact, and what happened where one cannot be had."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import REGEX_COMMIT_HASH
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from .reader import ArtifactError

HUB_OPTIONS = ("revision", "cache_dir", "token", "force_download", "local_files_only")
CLIENT_ERROR: Any = HfHubHTTPError.__bases__[0]  # what the HTTP client raises, httpx or httpx2


def check_no_file(path: str | os.PathLike[str]) -> None:
    """Refuse a file: an artifact is a folder, or a repository on the hub.

    Raises:
        ArtifactError: it is one.
    """
    if Path(path).is_file():
        raise ArtifactError(f"{path} is a file, expected an artifact's folder, or the name of a hub repository.")


def download(repo_id: str, filename: str, subfolder: str | None = None, **hub: Any) -> str | None:
    """Local path of a file of a hub repository, None where that commit certainly has no such file.

    Raises:
        OSError: it is not known, or the file could not be fetched; the message says what happened.
    """
    options = {key: hub[key] for key in HUB_OPTIONS if hub.get(key) is not None}
    name = f"{subfolder}/{filename}" if subfolder else filename
    try:
        return str(hf_hub_download(repo_id, name, **options))
    except LocalEntryNotFoundError as error:  # an EntryNotFoundError too, but it only says that there was no answer
        commit = options.get("revision", "")  # of a branch the cache only knows what it once had
        known = REGEX_COMMIT_HASH.fullmatch(commit) and try_to_load_from_cache(
            repo_id, name, revision=commit, cache_dir=options.get("cache_dir")
        )
        if known is _CACHED_NO_EXIST:
            return None
        raise OSError(reason(error, repo_id, name, options.get("revision"))) from error
    except EntryNotFoundError:
        return None
    except (OSError, ValueError, RuntimeError, CLIENT_ERROR) as error:  # huggingface_hub 1's tries again, closed
        raise OSError(reason(error, repo_id, name, options.get("revision"))) from error


def reason(error: BaseException, repo_id: str, name: str, revision: str | None = None) -> str:
    """What an error of huggingface_hub means for someone who wanted that file."""
    cause: BaseException = error
    if isinstance(error, (LocalEntryNotFoundError, ValueError)) and not isinstance(error, HfHubHTTPError):
        cause = error.__cause__ or error  # "not in the cache", or a download that was forced, after this
    what = f"{name} of {repo_id}" + (f" at revision {revision!r}" if revision else "")
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if isinstance(cause, HFValidationError):
        return f"{repo_id!r} is neither a folder that exists nor the name of a hub repository, such as 'user/name'."
    if isinstance(cause, (OfflineModeIsEnabled, LocalEntryNotFoundError)):
        return (
            f"There is no folder {repo_id!r} here. {what} is not in the cache, and the hub was not asked for it: "
            "HF_HUB_OFFLINE is set, or local_files_only=True. Load it once without, or name the cache that has it in "
            "cache_dir."
        )
    if isinstance(cause, RevisionNotFoundError):
        return f"{repo_id} has no revision {revision!r}: no branch, tag or commit of that name."
    if isinstance(cause, GatedRepoError):
        return f"{repo_id} is gated: ask for access on its page, and log in with `hf auth login` or pass token=."
    if isinstance(cause, RepositoryNotFoundError) or status == 401:
        return (
            f"There is no folder {repo_id!r}, and the hub has no such repository or shows it to some tokens only "
            f"(status {status}). Check the name; for a private one log in with `hf auth login` or pass token=."
        )
    if status == 403:
        return f"The hub refuses {what} to this token (status 403). Pass token= with the right to read it."
    return f"{what} could not be fetched, nor is it in the cache: {type(cause).__name__}: {cause}. Try again."


def pinned(path: str | os.PathLike[str], subfolder: str | None = None, **hub: Any) -> dict[str, Any]:
    """The hub's options with the commit that is there now as `revision`; a folder's are returned as they are.

    Raises:
        ArtifactError: it is a file.
        OSError: as `download`.
    """
    check_no_file(path)
    if Path(path).is_dir():
        return hub
    file = download(str(path), CONFIG_NAME, subfolder, **hub)
    if file is None:  # which the caller finds, too
        return hub
    # The cache's documented layout: snapshots/<commit>/<path in the repository>.
    commit = Path(file).parents[len(Path(subfolder or "", CONFIG_NAME).parts) - 1].name
    return {**hub, "revision": commit} if REGEX_COMMIT_HASH.fullmatch(commit) else hub


def local_copy(path: str | os.PathLike[str], subfolder: str | None = None, **hub: Any) -> Path | None:
    """The folder of the cache that has an artifact's files, all of one commit; fetches what it lacks.

    Returns:
        The folder; None where the path is a folder already, or has no adapter.

    Raises:
        OSError: as `download`.
    """
    if Path(path).is_dir():
        return None
    hub = pinned(path, subfolder, **hub)
    names = (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME, "config.json")
    files = [download(str(path), name, subfolder, **hub) for name in names]
    return None if None in files[:2] else Path(str(files[0])).parent
