"""The classes that load artifacts: an `AutoLottaLoraModelForX` for each `AutoModelForX` of transformers.

Editors read `auto_classes.pyi`, which `tests/artifact/make_auto_classes_stub.py` writes.
"""

from __future__ import annotations

from .auto import AutoLottaLora
from .loaders import LOADERS

__all__ = list(LOADERS)


def docstring(auto_name: str) -> str:
    """Of our class that stands for this one."""
    return f"Loads from an artifact what `transformers.{auto_name}` builds."


for _name, _auto in LOADERS.items():
    _members = {"_auto_class": _auto, "__doc__": docstring(_auto.__name__), "__module__": __name__}
    globals()[_name] = type(_name, (AutoLottaLora,), _members)
