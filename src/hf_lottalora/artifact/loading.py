"""Load an artifact whose kind of head nobody has named."""

from __future__ import annotations

import os
from typing import Any

from peft import PeftModel

from ..config import LottaLoraConfig
from . import auto_classes
from .config_json import load_architecture
from .files import HUB_OPTIONS
from .hub import pinned
from .loaders import loader_of


def load_model(path: str | os.PathLike[str], **options: Any) -> PeftModel:
    """The model of an artifact, by the class that its `config.json` names.

    Args:
        path: its folder, or its repository on the hub.
        options: those of `AutoLottaLoraModelFor....from_pretrained`.

    Raises:
        TypeError, ValueError, OSError: as there.
    """
    hub = {key: options[key] for key in ("subfolder", *HUB_OPTIONS) if options.get(key) is not None}
    hub |= pinned(path, **hub)
    config = LottaLoraConfig.from_pretrained(path, **hub)
    file = getattr(config, "_artifact_architecture", None)
    name = None
    if file is not None:
        architecture = load_architecture(file)
        name = loader_of(architecture, (architecture.architectures or [""])[0])
    loader = getattr(auto_classes, name or "AutoLottaLoraModel")
    model: PeftModel = loader.from_pretrained(path, **{**options, **hub})
    return model
