"""`lottalora verify`: whether an artifact is what its manifest says, and its scaffold what the seed draws here."""

from __future__ import annotations

from typing import Any

from ..artifact.base import base_of
from ..artifact.files import read_weights
from ..artifact.loading import load_model
from ..artifact.reader import ArtifactError
from .opened import artifact_folder, read_config
from .outcome import Outcome, table


def verify(
    path: str,
    *,
    expect: str | None = None,
    base_model: bool | str | None = None,
    residency: str = "dense",
    **where: Any,
) -> Outcome:
    """Compare files and digests, build the model, and draw every scaffold weight again.

    Args:
        path: a folder or a hub repository.
        expect: the digest that it should have.
        base_model: as `AutoLottaLoraModelFor....from_pretrained` takes it.
        residency: how the scaffold is held meanwhile.
        where: `subfolder`, `revision`, `token`.

    Returns:
        What was found; it has not passed where one comparison failed.

    Raises:
        ArtifactError, ValueError, OSError: it cannot be read, or not be loaded for another reason.
    """
    folder, hub = artifact_folder(path, **where)
    _, _, content = read_weights(folder)
    data: dict[str, Any] = {"path": path, "commit": hub.get("revision"), "digest": content.get("artifact")}
    data["expected"] = expect
    if expect is not None and expect != data["digest"]:
        return _failed(data, "digest", f"expected {expect}, found {data['digest']}: another artifact, or other files")
    try:
        config = read_config(folder)
    except ValueError as error:
        if isinstance(error.__cause__, OSError):  # a file could not be read
            raise
        return _failed(data, "files", error)
    if config._artifact_architecture is None:
        raise ArtifactError(
            f"{path} is of a plain nn.Module, which only its own code can build. Its files are as they were saved. For "
            "the rest, PeftModel.from_pretrained(module, path), then model.base_model.verify_scaffold(full=True)."
        )
    if config.redraw != "all" and not config.save_kept:
        base_of(config, path, base_model)  # that it may not be fetched says nothing of the artifact
    try:
        model = load_model(path, subfolder=where.get("subfolder"), residency=residency, base_model=base_model, **hub)
        model.base_model.verify_scaffold(full=True)
    except ValueError as error:
        if isinstance(error.__cause__, OSError):  # the base model could not be read
            raise
        return _failed(data, "scaffold", error)
    scaffold = model.base_model.get_plan().scaffold
    found = {"tensors": len(scaffold), "weights": sum(spec.numel for spec in scaffold.values())}
    text = {"verified": path, "digest": data["digest"] or "none: an artifact of version 0.1", **found}
    return Outcome({**data, "passed": True, "failed": None, "reason": None, "scaffold": found}, table(text))


def _failed(data: dict[str, Any], check: str, reason: object) -> Outcome:
    found = {**data, "passed": False, "failed": check, "reason": str(reason), "scaffold": None}
    return Outcome(found, f"{data['path']} failed the check of its {check}: {reason}", passed=False)
