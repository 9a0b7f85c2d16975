"""The part of `LottaLoraModel` that says which adapters are active, and which of them learn."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..layers.attention import ScaffoldAttention
from ..layers.switches import Switches
from ..layers.walk import outside_adapters, scaffold_layers
from ..plan.plan import Plan
from ..residency.forms import Residency
from ..scaffold.interrupts import uninterrupted
from .mixing import Mixing
from .trained import TrainedTensors


class Switching:
    """PEFT's switches of adapters, with the trained tensors that an adapter has beside its layers."""

    model: nn.Module
    switches: Switches
    trained: TrainedTensors
    mixing: Mixing
    plans: dict[str, Plan]
    residency: Residency
    active_adapter: str | list[str]
    active_adapters: list[str]
    _layers_disabled: bool
    _frozen: list[torch.Tensor]  # while layers are disabled: what was not trained before
    _restore_residency: Callable[[], None]

    @contextmanager
    def _switching(self) -> Iterator[None]:
        outer, self.switches.by_model = self.switches.by_model, True
        try:
            yield
        finally:
            self.switches.by_model = outer

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters, with the trained tensors of the one that has any.

        Raises:
            ValueError: two of them train copies of the same tensor.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        owner = None if self._layers_disabled else self.trained.owner_among(names)
        self.trained.check_installable(self.model, owner)
        self._frozen = []  # another choice since
        with self._switching():  # PEFT's own walks through the modules of all adapters, twice
            for layer in scaffold_layers(self.model):
                if layer.merged:
                    text = "Adapter cannot be set when the model is merged. Unmerging the model first."
                    warnings.warn(text, stacklevel=2)
                    layer.unmerge()
                layer.set_adapter(adapter_name, inference_mode=inference_mode)
        self.active_adapter = adapter_name
        self.trained.install(self.model, owner)
        self._set_trained_grad(names, not inference_mode)
        self._restore_residency()  # PEFT has unmerged layers, and base values are back where trained copies stood

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        self.trained.check_installable(self.model, self.trained.owner_among(self.active_adapters) if enabled else None)
        uninterrupted(lambda: self._switch_layers(enabled))

    def _switch_layers(self, enabled: bool) -> None:
        if not enabled and not self._layers_disabled:
            adapters = [
                p
                for layer in scaffold_layers(self.model)
                for name in layer.lora_beta
                for p in layer.adapter_parameters(name)
            ]
            trained = [p for name in self.plans for p in self.trained.parameters_of(self.model, name).values()]
            self._frozen = [parameter for parameter in (*adapters, *trained) if not parameter.requires_grad]
        self._layers_disabled = not enabled
        with self._switching():
            super()._enable_adapter_layers(enabled)  # type: ignore[misc]
        self.trained.install(self.model, self.trained.owner_among(self.active_adapters) if enabled else None)
        self._set_trained_grad(self.active_adapters, enabled)
        if enabled:
            for parameter in self._frozen:  # PEFT trains whatever it enables
                parameter.requires_grad_(False)
            self._restore_residency()  # a merged layer that ran while adapters were off has unmerged itself
            self._frozen = []

    def disable_adapter_layers(self) -> None:
        """As PEFT's, without its warning: trained biases are the base model's again, too."""
        self._enable_adapter_layers(enabled=False)

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        """Enable or disable gradients on adapters and their trained tensors."""
        with self._switching():
            super().set_requires_grad(adapter_names, requires_grad)  # type: ignore[misc]
        self._set_trained_grad([adapter_names] if isinstance(adapter_names, str) else adapter_names, requires_grad)

    def _parameters_of(self, adapter_name: str) -> Iterator[torch.Tensor]:
        """All of one adapter, in an order that its plan decides."""
        for layer in scaffold_layers(self.model):
            yield from layer.adapter_parameters(adapter_name)
        yield from self.trained.parameters_of(self.model, adapter_name).values()

    def _set_trained_grad(self, adapters: list[str], requires_grad: bool) -> None:
        for name in adapters:
            for parameter in self.trained.parameters_of(self.model, name).values():
                parameter.requires_grad_(requires_grad)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """PEFT's makes new, trainable parameters of an embedding's A and B: keep what was frozen frozen."""
        layers = scaffold_layers(self.model)
        frozen = [[not p.requires_grad for p in layer.adapter_parameters(adapter_name)] for layer in layers]
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)  # type: ignore[misc]
        for layer, flags in zip(layers, frozen, strict=True):
            for parameter, flag in zip(layer.adapter_parameters(adapter_name), flags, strict=True):
                parameter.requires_grad_(not flag)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter and its trained tensors; another one becomes active if it was."""
        self.trained.check_removable(self.model, adapter_name)
        was_active = adapter_name in self.active_adapters
        with self._switching():
            super().delete_adapter(adapter_name)  # type: ignore[misc]
        self.mixing.found.clear()
        self.switches.trained.discard(adapter_name)
        self.trained.remove(self.model, adapter_name)
        self.plans.pop(adapter_name, None)
        if was_active and self.active_adapters:
            self.set_adapter(self.active_adapters)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if self.residency != "dense" and torch.compiler.is_compiling():
            raise RuntimeError("torch.compile needs a scaffold in memory. Call set_residency('dense') first.")
        names = None if self._layers_disabled else kwargs.get("adapter_names")
        hooks = super()._enable_peft_forward_hooks(*args, **kwargs)  # type: ignore[misc]
        if names is None:
            with hooks:
                yield
            return
        attention = next((p for p, m in outside_adapters(self.model) if isinstance(m, ScaffoldAttention)), None)
        if attention is not None:
            raise ValueError(
                f"adapter_names is not supported with adapters on nn.MultiheadAttention, as in {attention!r}: they are "
                "summed into its matrices, one sum for all rows. Run the adapters one after the other with set_adapter."
            )
        given = [] if isinstance(names, str) else list(names)
        if not given or not all(isinstance(name, str) for name in given):
            raise ValueError(f"adapter_names must be a list with the name of an adapter for each row, got {names!r}.")
        hooks.__enter__()
        try:
            with self.mixing.batch(given, kwargs.get("num_beams") or 1):
                yield
        finally:
            hooks.__exit__(None, None, None)  # told of an error, PEFT's would leave its hooks behind

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: beta scales the scaffold itself, so a weighted sum of adapters is not an adapter of this form."""
        raise ValueError(
            "add_weighted_adapter is not supported: a LottaLoRA adapter also scales the scaffold (beta) and brings its "
            "own trained tensors, and these do not add up like LoRA deltas."
        )
