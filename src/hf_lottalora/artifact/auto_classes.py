"""The classes that load artifacts: an `AutoLottaLoraModelForX` for each `AutoModelForX` of transformers.

Editors read `auto_classes.pyi`, which `tests/artifact/make_auto_classes_stub.py` writes.
"""

from __future__ import annotations

import os
from typing import Any

from peft import PeftConfig

from ..config import LottaLoraConfig
from .auto import AutoLottaLora
from .base import base_of
from .config_json import load_architecture
from .files import HUB_OPTIONS, check_any_present
from .hub import pinned
from .loaders import LOADERS, loader_of

__all__ = list(LOADERS)


def docstring(auto_name: str) -> str:
    """Of our class that stands for this one."""
    return f"Loads from an artifact what `transformers.{auto_name}` builds."


def loader_for(auto: Any, path: str | os.PathLike[str], **hub: Any) -> tuple[Any, str | None]:
    """Our class for an auto class of transformers, or with None the artifact's own.

    Returns:
        The class; None where the path is no artifact of ours, or has a base model to be loaded over. And that.

    Raises:
        ValueError: a file of the artifact is missing or damaged, or its base model should not be fetched unasked.
    """
    wanted = {key: hub[key] for key in ("subfolder", *HUB_OPTIONS) if hub.get(key) is not None}
    check_any_present(path, wanted.get("subfolder"))
    wanted |= pinned(path, **wanted)
    config = PeftConfig.from_pretrained(path, **wanted)
    if config.peft_type != "LOTTALORA":
        return None, None
    config = LottaLoraConfig.from_pretrained(path, **wanted)  # with the files beside it
    if config.redraw != "all" and not config.save_kept:
        return None, base_of(config, path, None)[0]
    file = config._artifact_architecture
    if auto is None and file is not None:
        architecture = load_architecture(file)
        auto = LOADERS.get(loader_of(architecture, (architecture.architectures or [""])[0]) or "")
    ours = next((name for name, theirs in LOADERS.items() if theirs is auto), "AutoLottaLoraModel")
    return globals()[ours], None


for _name, _auto in LOADERS.items():
    _members = {"_auto_class": _auto, "__doc__": docstring(_auto.__name__), "__module__": __name__}
    globals()[_name] = type(_name, (AutoLottaLora,), _members)
