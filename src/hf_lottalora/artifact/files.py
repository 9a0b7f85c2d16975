"""The artifact folder: what must be in it before it is loaded, and what completes it when it is saved.

- adapter_config.json: the LottaLoraConfig with seed, format, family and digests;
- adapter_model.safetensors: A, B, beta; trained and kept tensors; the manifest. Never a scaffold weight;
- config.json: the architecture;
- README.md: a model card that shows how to load it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from ..config import LottaLoraConfig
from ..plan.plan import MANIFEST_KEY, Plan
from ..scaffold.tensor import first_difference
from .card import write_card
from .hub import HUB_OPTIONS as HUB_OPTIONS
from .hub import download
from .hub import pinned as pinned
from .manifest import read_manifest


def locate(path: str | os.PathLike[str], filename: str, subfolder: str | None = None, **hub: Any) -> str | None:
    """Local path of one file of an artifact folder or hub repository, None where it has no such file.

    Raises:
        OSError: the hub did not say whether it has; the message says what happened.
    """
    if Path(path).is_dir():
        file = Path(path, subfolder or "", filename)
        return str(file) if file.is_file() else None
    return download(str(path), filename, subfolder, **hub)


def check_artifact_files(
    config: LottaLoraConfig, path: str | os.PathLike[str], subfolder: str | None = None, **hub: Any
) -> None:
    """Check the weights that stand beside an `adapter_config.json`, reading their header and manifest only.

    Leaves the shapes found there in the config: they are compared with the plan before a base model is touched.

    Raises:
        ValueError: no safetensors file, a pickled one instead, a truncated or foreign one, or one of another seed.
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
    try:
        with safe_open(weights, framework="pt") as file:
            keys = list(file.keys())
            tensor = file.get_tensor(MANIFEST_KEY) if MANIFEST_KEY in keys else None
            config._artifact_shapes = {key: tuple(file.get_slice(key).get_shape()) for key in keys}
    except SafetensorError as error:
        raise ValueError(f"{weights} is not a readable safetensors file; it may be truncated ({error}).") from error
    content = read_manifest(tensor, weights)
    config._artifact_architecture = locate(path, "config.json", subfolder, **hub)
    if content["seed"] != config.seed:
        raise ValueError(
            f"{weights} belongs to seed {content['seed']}, but the adapter_config.json beside it says {config.seed}. "
            "One of the two files was changed or comes from another artifact."
        )
    if config.scaffold_digests is not None:
        difference = first_difference(config.scaffold_digests, content["scaffold"])
        if difference:
            raise ValueError(f"{weights} and the adapter_config.json beside it disagree: {difference}.")


def check_not_pickled(folder: str | os.PathLike[str]) -> None:
    """Refuse to complete an artifact that PEFT has begun with pickled weights.

    Raises:
        ValueError: the folder contains such a file, of this or another model.
    """
    if Path(folder, WEIGHTS_NAME).is_file():
        raise ValueError(
            f"{folder} contains {WEIGHTS_NAME}, a pickle; LottaLoRA artifacts are safetensors only. Delete that file "
            "and save without safe_serialization=False. The config and any weights in safetensors there are untouched."
        )


def complete_artifact(plan: Plan, save_directory: str | os.PathLike[str], dtype: torch.dtype | None) -> None:
    """Write `config.json` (with the model's `dtype`) and our part of the card beside the weights that PEFT wrote."""
    folder = Path(save_directory)
    architecture = plan.survey.architecture
    if architecture is not None:
        architecture = type(architecture).from_dict(architecture.to_dict())
        architecture.architectures = [plan.survey.class_name]
        architecture.dtype = dtype
        architecture.save_pretrained(folder)
    if Path(folder, SAFETENSORS_WEIGHTS_NAME).is_file():
        write_card(plan, folder)
