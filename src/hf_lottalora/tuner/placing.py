"""The part of `LottaLoraModel` that PEFT asks where adapters go, and what takes the place of a module there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from ..config import LottaLoraConfig
from ..layers.attention import ScaffoldAttention
from ..layers.conv import ScaffoldConv
from ..layers.embedding import ScaffoldEmbedding, TiedHead
from ..layers.linear import ScaffoldLinear
from ..layers.rows import TrainedRows
from ..layers.sources import Sources
from ..layers.switches import Switches
from ..paths import clean_modules
from ..plan.plan import Plan
from ..residency.foreign import in_memory, is_foreign

_PATTERNS = ("rank_pattern", "alpha_pattern")


@contextmanager
def as_planned(config: LottaLoraConfig, plan: Plan) -> Iterator[None]:
    """While PEFT injects: without what matches no layer, of which the plan has warned, and to be changed by PEFT.

    PEFT expands "all-linear", condenses long lists in place, and would warn once more.
    """
    requested = {name: getattr(config, name) for name in ("target_modules", "exclude_modules", *_PATTERNS)}
    paths = [adapter.module for adapter in plan.adapters if adapter.kind != "tied_head"]
    try:
        config.exclude_modules = None
        for name in _PATTERNS:
            keys = [key for key in requested[name] if any(get_pattern_key([key], path) == key for path in paths)]
            setattr(config, name, {key: requested[name][key] for key in keys})
        yield
    finally:
        for name, value in requested.items():
            setattr(config, name, value)


class Placing:
    """What differs from PEFT's LoRA while adapters are injected: the plan has decided."""

    switches: Switches

    @staticmethod
    def _check_target_module_exists(peft_config: LottaLoraConfig, key: str) -> Any:
        plan = peft_config._plan
        if plan is None or any(a.module == key and a.kind != "tied_head" for a in plan.adapters):
            return plan is not None
        matched = check_target_module_exists(peft_config, key)
        return False if matched else matched  # PEFT tells what is excluded from what does not match

    def _check_new_adapter_config(self, config: LottaLoraConfig) -> None:
        """Nothing: of biases that are trained every adapter has its own, of which PEFT has one for all."""

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        """As PEFT's, without its own way with biases: those that an adapter trains are switched with it."""
        super()._mark_only_adapters_as_trainable(model)  # type: ignore[misc]
        for _, module in clean_modules(model):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)

    def _check_tied_modules(self, model: nn.Module, peft_config: LottaLoraConfig) -> None:
        """Nothing to check or warn about: the plan has, and tied tensors stay one tensor."""

    def _get_tied_target_modules(self, model: nn.Module) -> list[str]:
        return []  # see TiedHead: merging keeps the tie

    @staticmethod
    def _create_new_module(
        lora_config: LottaLoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> nn.Module:
        requantise = {key: kwargs[key] for key in ("get_apply_tensor_subclass",) if key in kwargs}
        kwargs = {key: kwargs[key] for key in ("r", "lora_alpha", "target_name")}
        if isinstance(target, _ConvNd):
            return ScaffoldConv(target, adapter_name, config=lora_config, **kwargs)
        if isinstance(target, nn.MultiheadAttention):
            return ScaffoldAttention(target, adapter_name, config=lora_config, **kwargs)
        rows = lora_config._plan.trained_rows()
        if isinstance(target, nn.Embedding) and kwargs["target_name"] in rows:
            return TrainedRows(target, adapter_name, config=lora_config, **kwargs)
        if isinstance(target, nn.Embedding):
            return ScaffoldEmbedding(target, adapter_name, config=lora_config, **kwargs)
        layer = ScaffoldLinear(target, adapter_name, config=lora_config, **kwargs)
        if is_foreign(target.weight) and requantise:  # type: ignore[arg-type]
            layer.quantization_backend = resolve_quantization_backend(target, **requantise)
        layer.fan_in_fan_out = layer.is_target_conv_1d_layer = isinstance(target, Conv1D)
        return layer

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        with in_memory(child):  # PEFT puts the adapter where the child is, which may be offloaded
            super()._replace_module(parent, child_name, new_module, child)  # type: ignore[misc]

    def _finish_adapters(
        self, model: nn.Module, adapter_name: str, plan: Plan, config: LottaLoraConfig, start: bool
    ) -> None:
        names = {tensor.path: tensor.name for tensor in plan.tensors}
        sources = Sources(config)
        for adapter in plan.adapters:
            layer: Any = model.get_submodule(adapter.path)
            if adapter.kind == "tied_head":
                if not isinstance(layer, TiedHead):
                    parent, _, child = adapter.path.rpartition(".")
                    setattr(model.get_submodule(parent), child, TiedHead(layer, model.get_input_embeddings()))  # type: ignore[operator]
                continue
            layer.switches = self.switches
            layer.scaffold = plan.scaffold.get(adapter.weight) or layer.scaffold
            layer.own_forward = adapter.own_forward
            if not adapter.train_beta:
                layer.freeze_beta(adapter_name)
            path = names[adapter.weight].removesuffix("weight")[:-1]
            if adapter.source != "lora":
                shapes, held = layer.pair_shapes(adapter.r), (layer.lora_A[adapter_name], layer.lora_B[adapter_name])
                layer.sources[adapter_name] = sources.of(path, adapter.r, shapes, held)
            if start:
                layer.init_adapter(adapter_name, path, config.effective_adapter_seed, bool(config.init_lora_weights))
