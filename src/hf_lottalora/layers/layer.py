"""The layer: `y = beta * (W x) + scaling * B A x + bias` (paper section 1), over PEFT's LoRA layers.

Shapes: x `(..., I)`, W `(O, I)` (nn.Linear) or `(I, O)` (Conv1D), A `(r, I)`, B `(O, r)`, beta `(1,)`.

With several active adapters each adds `(beta_i - 1) W x + s_i B_i A_i x` to the same W x; one gives the paper's
equation exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..config import LottaLoraConfig
from ..residency.foreign import in_memory
from ..scaffold.tensor import ScaffoldTensor
from .adapter_tensor import DECAYED, UNDECAYED, AdapterTensor
from .coefficients import Coefficients, coefficient_shapes
from .description import described
from .functional import without_autocast
from .magnitude import MagnitudeLayer
from .merging import MergingLayer
from .mixed import RowAdapters
from .sources import Source, start_of_A
from .switches import Switches


class ScaffoldLayer(MergingLayer, MagnitudeLayer):
    """What LottaLoRA adds to a PEFT LoRA layer: beta, and a base weight that can be drawn again."""

    own_tensors = ("lora_beta", "lora_magnitude", "lora_norm_weight", "lora_norm_bias")
    adapter_layer_names = (*lora.LoraLayer.adapter_layer_names, *own_tensors)
    other_param_names = (*lora.LoraLayer.other_param_names, "residual", "sources")
    lora_beta: dict[str, AdapterTensor]  # each of them a ModuleDict
    lora_norm_weight: dict[str, AdapterTensor]
    lora_norm_bias: dict[str, AdapterTensor]
    sources: dict[str, Source]  # of adapters whose A and B are not trained themselves
    _active_adapter: str | list[str]

    # Whether the base layer computes its output by code of its own, which the adapter goes around.
    own_forward = False
    switches = Switches()  # the model's, once it has placed the layer

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        if not isinstance(config, LottaLoraConfig):
            raise ValueError(
                f"A {type(config).__name__} would put its adapter into the layers of a LottaLoRA model. Call "
                "merge_and_unload() or unload() on that model first."
            )
        if "lora_beta" not in self._modules:
            for kind in self.own_tensors:
                self.register_module(kind, nn.ModuleDict())
            self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}
            self.residual: dict[str, bool] = {}
            self.sources = {}
            self._made: set[str] = set()
        self._made.discard(adapter_name)
        decayed: bool = config.decay_beta
        self.lora_beta[adapter_name] = AdapterTensor(torch.ones(1), decayed)
        self.residual[adapter_name] = config.residual
        if config.use_dora:
            W = self.get_base_layer().weight
            W = W.t() if self._weight_is_IO else W
            shape = (self._groups, *W.shape[1:]) if config.dora_magnitude == "inputs" else len(W)
            self.lora_magnitude[adapter_name] = AdapterTensor(torch.ones(shape), decayed)
        if config.layer_norm:
            self.lora_norm_weight[adapter_name] = AdapterTensor(torch.ones(self.out_features), decayed)
            self.lora_norm_bias[adapter_name] = AdapterTensor(torch.zeros(self.out_features), decayed)
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
        if config.adapter != "lora":
            self._hold_coefficients(adapter_name, config)
        self._made.add(adapter_name)

    def _hold_coefficients(self, adapter_name: str, config: LottaLoraConfig) -> None:
        """Put what is trained in the places of A and B."""
        r = self.r[adapter_name]
        A, B = self.pair_shapes(r)
        of_A, of_B = coefficient_shapes(config.adapter, r, math.prod(A[1:]), B[0], config.bases or 0)
        bias = self.lora_B[adapter_name].bias
        self.lora_A[adapter_name], self.lora_B[adapter_name] = Coefficients(*of_A), Coefficients(*of_B, bias)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def pair_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of LoRA's A and B here."""
        return (r, self.in_features), (self.out_features, r)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's leaves the dtype of what is on the meta device, and rounds to the base layer's dtype what
        # low_cpu_mem_usage has just read from a file; of an embedding's A and B it makes new, trainable ones.
        with in_memory(self):
            W = self.get_base_layer().weight
        dtype, device = None if adapter_name in self._made else W.dtype, device or W.device
        for tensor in self.adapter_parameters(adapter_name):
            tensor.data = tensor.data.to("meta" if tensor.is_meta else device, dtype)

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Those of all adapters, with the adapter's name."""
        for role in self.adapter_layer_names:
            kept = getattr(self, role)
            yield from kept._parameters.items()
            for name, module in kept._modules.items():
                # Not `parameters()` of each, which would take most of the time.
                for tensor in module.parameters() if module._modules else module._parameters.values():
                    yield name, tensor

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's; all that is kept here per adapter goes with it."""
        self.switches.check("delete_adapter")
        self._made.discard(adapter_name)
        super().delete_adapter(adapter_name)

    def adapter_parameters(self, adapter_name: str) -> Iterator[nn.Parameter]:
        """Those of one adapter here, in an order that does not change."""
        for role in self.adapter_layer_names:
            held = getattr(self, role, {})
            if adapter_name in held:
                item = held[adapter_name]
                yield from item.parameters() if isinstance(item, nn.Module) else (item,)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Take state dicts of whole models with the names of 0.1 (`lora_beta.default`), or of another decay_beta."""
        for kind in self.own_tensors:
            for name, held in getattr(self, kind).items():
                stem = f"{prefix}{kind}.{name}"
                for other in {stem, f"{stem}.{UNDECAYED}", f"{stem}.{DECAYED}"} & state_dict.keys():
                    state_dict[f"{stem}.{held.name}"] = state_dict.pop(other)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's. With a hundred adapters its walk through their modules takes longer than all else."""
        self.switches.check("set_adapter")
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name, tensor in self._tensors():
            learns = name in names and not inference_mode
            if tensor is not None and tensor.requires_grad != learns and tensor.is_leaf:
                tensor.requires_grad_(learns)
        self._freeze_non_trainable_peft_weights(names)
        self._active_adapter = names

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        self.switches.check("set_requires_grad")
        super().set_requires_grad(adapter_names, requires_grad)

    def freeze_beta(self, adapter_name: str) -> None:
        """Beta stays as it is, whatever PEFT switches on."""
        self.frozen_peft_weight_names[adapter_name] = ("lora_beta",)
        self.lora_beta[adapter_name].requires_grad_(False)

    def resolve_lora_variant(self, *, config: Any, **kwargs: Any) -> None:
        """None: PEFT's variants would bypass beta. What there is of DoRA is here."""

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: `(beta - 1) W` is of full rank, and what is trained beside the layers would be left out."""
        return False

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str) -> None:
        """Nothing: the tuner draws A and B from the stream, by name (`init_adapter`)."""

    def _pair(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B as `(r, in)` and `(out, r)`; of RandLoRA with as many directions as it has."""
        A, B = self.lora_A[adapter_name], self.lora_B[adapter_name]
        source = self.sources.get(adapter_name)
        return (A.weight, B.weight) if source is None else source.pair(A, B)

    def init_adapter(self, adapter_name: str, path: str, seed: int, zero_B: bool) -> None:
        """Draw A (Kaiming uniform, see `start_of_A`) and B (zero, or likewise), or start what makes them.

        An embedding's A multiplies one-hot rows: as in PEFT it is the zero one, and its B is normal.
        """
        source = self.sources.get(adapter_name)
        if source is not None:
            source.start(self.lora_A[adapter_name], self.lora_B[adapter_name])
        else:
            self._draw_pair(adapter_name, path, seed, zero_B)
        if self.lora_bias[adapter_name]:  # as torch's, U(-1/sqrt(r), 1/sqrt(r)), unless B is zero
            bias, scale = self.lora_B[adapter_name].bias, 1 / math.sqrt(3 * self.r[adapter_name])
            spec = ScaffoldTensor(f"{path}.lora_B.bias", tuple(bias.shape), seed, "uniform", scale)
            bias.data.copy_(torch.zeros_like(bias) if zero_B else spec.draw(bias.dtype, bias.device))
        if adapter_name in self.lora_magnitude:
            with in_memory(self):
                self.lora_magnitude[adapter_name].value.data.copy_(self._norms(adapter_name))

    @torch.no_grad()
    def _draw_pair(self, adapter_name: str, path: str, seed: int, zero_B: bool) -> None:
        embedding = isinstance(self.get_base_layer(), nn.Embedding)
        for role, tensor in zip("AB", self._pair(adapter_name), strict=True):
            if zero_B and role == ("A" if embedding else "B"):
                nn.init.zeros_(tensor)
                continue
            spec = start_of_A(path, tuple(tensor.shape), seed)
            if embedding:
                spec = replace(spec, family="normal", scale=1.0)
            tensor.copy_(replace(spec, name=f"{path}.lora_{role}.weight").draw(tensor.dtype, tensor.device))

    def _has(self, adapter_name: str) -> bool:
        return adapter_name in self.lora_beta

    def _active(self) -> list[str]:
        adapters = [name for name in self.active_adapters if self._has(name)]
        self._check_together(adapters)
        return adapters

    def _total_beta(self, adapters: list[str]) -> torch.Tensor:
        if len(adapters) == 1:
            return self.lora_beta[adapters[0]].value
        changes: Any = sum(self.lora_beta[name].value - 1 for name in adapters)
        return 1 + changes

    def _total_bias(self, adapters: list[str]) -> torch.Tensor | None:
        """The layer's bias and those of the adapters, `bias + scaling * b`; in the layer's dtype."""
        bias: torch.Tensor | None = self.get_base_layer().bias
        for name in adapters:
            if self.lora_bias[name]:
                own = (self.scaling[name] * self.lora_B[name].bias).to(self.get_base_layer().weight.dtype)
                bias = own if bias is None else bias + own
        return bias

    def _summed_weight(self, adapters: list[str]) -> torch.Tensor:
        """`beta W + scaling B A` of all active adapters, with DoRA's magnitude: W's shape, at least float32."""
        weight = self.get_base_layer().weight
        exact = torch.promote_types(weight.dtype, torch.float32)
        with without_autocast(weight):
            total = self._total_beta(adapters).to(exact) * weight.to(exact)
            for name in adapters:
                A, B = (tensor.to(exact) for tensor in self._pair(name))
                total = total + self.scaling[name] * self._product(A, B)
            if adapters[0] in self.lora_magnitude:
                total = self._with_magnitude_in(total, adapters[0])
        return total

    def _finished(self, y: torch.Tensor, x: torch.Tensor, adapters: list[str], channels: int = -1) -> torch.Tensor:
        """What follows the layer: residual and LayerNorm; `channels` is the dimension of outputs."""
        name = adapters[0]
        if self.residual[name] and self._keeps_shape:
            y = y + x
        if name in self.lora_norm_weight:
            weight, bias = (held[name].value.to(y.dtype) for held in (self.lora_norm_weight, self.lora_norm_bias))
            y = F.layer_norm(y, (y.shape[-1],), weight, bias)
        return y

    def _check_together(self, adapters: list[str]) -> None:
        """Refuse several adapters at once where what one computes is no sum."""
        options = (self.lora_magnitude, self.lora_norm_weight, {name for name, on in self.residual.items() if on})
        if len(adapters) > 1 and any(name in found for name in adapters for found in options):
            raise ValueError(
                f"Adapters {adapters} cannot be active together: use_dora, layer_norm and residual do not add up."
            )

    @property
    def _keeps_shape(self) -> bool:
        """Whether the output has the input's shape, so that a residual is possible."""
        return bool(self.in_features == self.out_features)

    def _dirac(self, kernel: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _product(self, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        """B A in the layout of W."""
        return (B @ A).t() if self._weight_is_IO else B @ A

    def _mixed_batch_forward(
        self, x: torch.Tensor, *args: Any, adapter_names: list[str], **kwargs: Any
    ) -> torch.Tensor:
        def of(name: str, rows: torch.Tensor) -> torch.Tensor:
            if self._has(name):
                return self._in_memory(x[rows], [name], *args, **kwargs)
            result: torch.Tensor = self.base_layer(x[rows], *args, **kwargs)
            return result

        return RowAdapters.of(adapter_names).apart(of, x.device)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`(..., I) -> (..., O)`; for an embedding `(...) -> (..., O)`."""
        self._check_forward_args(x, *args, **kwargs)
        adapter_names = kwargs.pop("adapter_names", None)
        kwargs.pop("alora_offsets", None)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if adapter_names is not None and not self.disable_adapters:
            return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        active = self._active()
        if self.disable_adapters or self.merged or not active:
            result: torch.Tensor = self.base_layer(x, *args, **kwargs)
            return result
        return self._in_memory(x, active, *args, **kwargs)

    def _in_memory(self, x: torch.Tensor, adapters: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        if not hasattr(self.get_base_layer(), "_hf_hook"):
            return self._adapted(x, adapters, *args, **kwargs)
        with in_memory(self):  # Accelerate's hook is for calls of the base layer, and its weight is read without
            return self._adapted(x, adapters, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Code of a model may ask a layer for its sizes, as MobileNet asks a convolution for its stride."""
        own = self.__dict__.get("_modules", {}).get(name)
        if own is not None:  # as the next line does, in half the time
            return own
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self._modules.get("base_layer")
            if base is not None and name in getattr(base, "__constants__", ()):
                return getattr(self.get_base_layer(), name)
            raise

    def __repr__(self) -> str:
        return described(self)

    @property
    def _weight_is_IO(self) -> bool:
        return isinstance(self.get_base_layer(), (Conv1D, nn.Embedding))

    def _adapted(self, x: torch.Tensor, adapters: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        """The layer's output with these adapters; further arguments are for a base layer with a forward of its own."""
        raise NotImplementedError
