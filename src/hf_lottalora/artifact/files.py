"""The artifact folder: what must be in it before it is loaded, and what completes it when it is saved.

- adapter_config.json: the LottaLoraConfig with seed, format, family and digests;
- adapter_model.safetensors: A, B, beta; trained and kept tensors; the manifest. Never a scaffold weight;
- config.json: the architecture;
- README.md: a model card that shows how to load it.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import safe_open

from ..config import LottaLoraConfig
from ..plan.plan import Plan
from .architecture import check_config_file, warn_of_changes
from .card import write_card
from .config_json import check_config_json
from .current import current as current
from .current import whole as whole
from .hub import HUB_OPTIONS as HUB_OPTIONS
from .hub import check_no_file, download
from .hub import pinned as pinned
from .manifest import check_options, check_tensors, read_manifest, warn_of_0_1
from .reader import ArtifactError, check_file, read_weights_header


def locate(path: str | os.PathLike[str], filename: str, subfolder: str | None = None, **hub: Any) -> str | None:
    """Local path of one file of an artifact folder or hub repository, None where it has no such file.

    Raises:
        ArtifactError: it is no ordinary file, or a symbolic link out of the folder.
        OSError: the hub did not say whether it has one; the message says what happened.
    """
    if Path(path).is_dir():
        file = current(Path(path, subfolder or ""), filename)
        return check_file(file, path) if os.path.lexists(file) else None
    downloaded = download(str(path), filename, subfolder, **hub)
    return downloaded and check_file(downloaded, Path(downloaded).parent)


def check_present(path: str | os.PathLike[str], subfolder: str | None = None) -> None:
    """Refuse a folder without an `adapter_config.json`; PEFT would look for a repository of its name on the hub.

    Raises:
        ArtifactError: it has none, or what is no ordinary file; or it is a file itself.
    """
    check_no_file(path)
    if Path(path).is_dir() and locate(path, CONFIG_NAME, subfolder) is None:
        folder = Path(path, subfolder or "")
        others = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG_NAME}")) if folder.is_dir() else []
        instead = f" There are some in its folders {', '.join(others)}: pass one as subfolder." if others else ""
        raise ArtifactError(f"Can't find {CONFIG_NAME!r} at '{folder}', expected a saved adapter.{instead}")


def check_any_present(path: str | os.PathLike[str], subfolder: str | None = None) -> None:
    """The same, for a folder of any method: whose `adapter_config.json` may be a link to anywhere."""
    if not Path(path, subfolder or "", CONFIG_NAME).is_file():
        check_present(path, subfolder)


def read_weights(
    path: str | os.PathLike[str], subfolder: str | None = None, **hub: Any
) -> tuple[str, dict[str, tuple[int, ...]], dict[str, Any]]:
    """The path of an artifact's weights, the shapes in them by key, and the content of their manifest; no more is read.

    Raises:
        ValueError: no safetensors file, a pickled one instead, or a truncated or foreign one.
    """
    weights = locate(path, SAFETENSORS_WEIGHTS_NAME, subfolder, **hub)
    if weights is None:
        if locate(path, WEIGHTS_NAME, subfolder, **hub):
            raise ValueError(
                f"{path} has its weights in {WEIGHTS_NAME}, a pickle, which can run code when it is read. LottaLoRA "
                f"reads {SAFETENSORS_WEIGHTS_NAME} only; save the adapter again with safe_serialization=True."
            )
        raise ValueError(
            f"{path} has no {SAFETENSORS_WEIGHTS_NAME}; expected a folder made by save_pretrained. To read a "
            "config alone, use peft.PeftConfig.from_pretrained."
        )
    shapes, manifest = read_weights_header(weights)
    return weights, shapes, read_manifest(manifest, weights)


def check_artifact_files(
    config: LottaLoraConfig, path: str | os.PathLike[str], subfolder: str | None = None, **hub: Any
) -> None:
    """Check the files that stand beside an `adapter_config.json`, and that file, against the manifest in the weights.

    Leaves what is found there in the config: it is compared with the plan before a base model is touched.

    Raises:
        ValueError: no safetensors file, a pickled one instead, a truncated or foreign one, or one whose tensors are
            not those that were saved; an option or the architecture was changed; or a `config.json` of which no model
            should be built.
    """
    weights, config._artifact_shapes, content = read_weights(path, subfolder, **hub)
    config._artifact_manifest = content
    check_options(content, config, weights)
    config._artifact_architecture = locate(path, "config.json", subfolder, **hub)
    if config._artifact_architecture is not None:
        check_config_json(config._artifact_architecture, recorded_tensors(config))
        check_config_file(content, config._artifact_architecture, weights)
    with safe_open(weights, framework="pt") as file:
        check_tensors(content, config._artifact_shapes, file.get_tensor, weights)
    warn_of_0_1(content, weights)


def recorded_tensors(config: LottaLoraConfig) -> int:
    """How many tensors the artifact has or names that this config was read from."""
    content: Any = config._artifact_manifest
    return len(config._artifact_shapes or ()) + len(content["scaffold"]) + len(content["kept"])


def check_not_pickled(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder that has pickled weights, which could be taken for the artifact's.

    Raises:
        ValueError: it contains such a file, of this or another model.
    """
    if Path(folder, WEIGHTS_NAME).is_file():
        raise ValueError(
            f"{folder} contains {WEIGHTS_NAME}, a pickle; LottaLoRA artifacts are safetensors only. Delete that "
            "file, or save elsewhere. Nothing was written."
        )


def complete_artifact(plan: Plan, save_directory: str | os.PathLike[str], dtype: torch.dtype | None) -> None:
    """Write `config.json` (with the model's `dtype`) and our part of the card beside the weights that PEFT wrote."""
    folder = Path(save_directory)
    architecture = plan.survey.architecture
    if architecture is not None:
        warn_of_changes(plan.survey.built_with, architecture)
        architecture = copy.deepcopy(architecture)
        architecture.architectures = [plan.survey.class_name]
        architecture.dtype = dtype
        architecture.save_pretrained(folder)
    if Path(folder, SAFETENSORS_WEIGHTS_NAME).is_file():
        write_card(plan, folder)
