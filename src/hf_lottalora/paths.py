"""Where a module or tensor of the base model is, also under the layers that PEFT has put around it."""

from __future__ import annotations

from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


def clean_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The base model's own modules with the paths they had before PEFT wrapped them, every path of a shared one."""

    def walk(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        yield path, module
        for name, child in module._modules.items():  # named_children() would name a shared child once
            if child is not None:
                yield from walk(f"{path}.{name}" if path else name, child)

    yield from walk("", model)


def owner_of(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds the tensor with this clean path, and the tensor's name there."""
    *parts, attribute = path.split(".")
    module = model
    for part in parts:
        module = getattr(module, part)
        module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return module, attribute
