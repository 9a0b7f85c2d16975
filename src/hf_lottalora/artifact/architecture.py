"""Whether a base model, and an artifact's `config.json`, have the architecture that the artifact was made over."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from ..plan.canonical import first_change, first_contradiction, first_edit, plain, read_back
from .config_json import build
from .hollow import hollow
from .reader import read_json


def check_architecture(content: Mapping[str, Any], file: str | None, model: nn.Module) -> None:
    """Compare the base model's configuration with the manifest of an artifact, or with the `config.json` of 0.1's.

    Two models of the same shapes can still compute other things: heads, activation, rotary base, epsilons.

    Args:
        content: the manifest.
        file: path of the `config.json`, None where there is none.
        model: the base model; a plain `nn.Module` has no configuration to compare.

    Raises:
        ValueError: a key that changes what the model computes differs; the message names it.
    """
    described, architecture = content.get("architecture"), getattr(model, "config", None)
    if not isinstance(architecture, PreTrainedConfig) or (described is None and file is None):
        return
    values = described["values"] if described else read_json(str(file))
    difference: Any = ("model_type", values.get("model_type"), architecture.model_type)
    if values.get("model_type") == architecture.model_type:
        saved: Any = None if file is None else build(file, lambda: type(architecture).from_pretrained(file))

        def compare(config: Any) -> Any:
            return first_contradiction(described, config) if described else first_change(saved, config)

        difference = compare(architecture) and compare(read_back(architecture))
        if difference and saved is not None:  # some models write into the configuration that they are built from
            with hollow():
                built: Any = type(model)(saved)
            difference = first_change(built.config, architecture) and difference
    if difference:
        key, theirs, ours = difference
        raise ValueError(
            f"The artifact was made over another architecture: its config.json says {key}={theirs!r}, this model has "
            f"{ours!r}. Nothing was loaded. Build the base model from that config.json."
        )


def warn_of_changes(built_with: Mapping[str, Any], architecture: PreTrainedConfig) -> None:
    """Say which key of a model's configuration was changed since the model was planned.

    But for tokens, which tokenizers bring: what they would change in a table is recorded apart from them.
    """
    now = plain(architecture)
    keys = (key for key in built_with.keys() & now.keys() if not key.endswith("token_id"))
    changed = sorted(key for key in keys if built_with[key] != now[key])
    if changed:
        key = changed[0]
        warnings.warn(
            f"config.{key} was changed from {built_with[key]!r} to {now[key]!r} since get_peft_model. The artifact "
            f"says {now[key]!r}: what loads it builds a model with that, and this one was built without. Change a "
            "configuration before the model is built.",
            UserWarning,
            stacklevel=2,
        )


def check_config_file(content: Mapping[str, Any], file: str, where: str) -> None:
    """Compare what an artifact's `config.json` says with what its manifest describes.

    Raises:
        ValueError: they differ; the message names the key.
    """
    described = content.get("architecture")
    if described is None:
        return
    said = read_json(file)
    facts = (("architectures", [content["class"]]), ("dtype", described["dtype"]))
    difference = next(((key, value, said.get(key)) for key, value in facts if said.get(key) != value), None)
    difference = difference or first_edit(described, PreTrainedConfig.get_config_dict(file)[0])
    if difference:
        key, expected, found = difference
        raise ValueError(
            f"{file}: {key}: expected {expected!r}, as {where} beside it says, found {found!r}. It was changed, or "
            "comes from another artifact. Nothing was loaded."
        )
