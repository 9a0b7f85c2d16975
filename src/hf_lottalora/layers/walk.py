"""The modules of a model, without a walk through what its layers keep for each adapter."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from .layer import ScaffoldLayer


def outside_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules with their paths, but for those that layers keep for each adapter, which can be thousands."""
    seen = set()

    def walk(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if module in seen:
            return
        seen.add(module)
        yield path, module
        for name, child in module._modules.items():
            if child is not None and (name == "base_layer" or not isinstance(module, ScaffoldLayer)):
                yield from walk(f"{path}.{name}" if path else name, child)

    yield from walk("", model)


def scaffold_layers(model: nn.Module) -> list[ScaffoldLayer]:
    """The adapted layers of a model."""
    return [module for _, module in outside_adapters(model) if isinstance(module, ScaffoldLayer)]
