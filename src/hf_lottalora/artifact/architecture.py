"""Whether a base model has the architecture that an artifact was made over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from ..plan.canonical import first_change, read_back
from .hollow import hollow


def check_architecture(file: str | None, model: nn.Module) -> None:
    """Compare the artifact's `config.json` with the base model's configuration, where both know a key.

    Two models of the same shapes can still compute other things: heads, activation, rotary base, epsilons.

    Args:
        file: path of the `config.json`, None where there is none.
        model: the base model; a plain `nn.Module` has no configuration to compare.

    Raises:
        ValueError: a key that changes what the model computes differs; the message names it.
    """
    architecture: Any = getattr(model, "config", None)
    if file is None or not isinstance(architecture, PreTrainedConfig):
        return
    made_over = json.loads(Path(file).read_text(encoding="utf-8")).get("model_type")
    if made_over != architecture.model_type:
        difference: Any = ("model_type", made_over, architecture.model_type)
    else:
        saved = type(architecture).from_pretrained(file)
        difference = first_change(saved, architecture) and first_change(saved, read_back(architecture))
        if difference:  # some models write into the configuration that they are built from
            with hollow():
                built: Any = type(model)(saved)
            difference = first_change(built.config, architecture) and difference
    if difference:
        key, theirs, ours = difference
        raise ValueError(
            f"The artifact was made over another architecture: its config.json says {key}={theirs!r}, this model has "
            f"{ours!r}. Nothing was loaded. Build the base model from that config.json."
        )
