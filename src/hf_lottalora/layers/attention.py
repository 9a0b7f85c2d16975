"""The equation inside torch's `nn.MultiheadAttention`, which multiplies with its matrices itself.

Shapes: the fused projection W `(3 E, E)`, or for other sizes of keys and values three matrices `(E, E)`, `(E, K)` and
`(E, V)`, and the output's `(E, E)`. Each has its own A `(r, inputs)`, B `(outputs, r)` and beta.

No module of its own multiplies with one of them, so the sum `beta W + (alpha / r) B A` takes W's place in each forward
pass. PEFT does that too; here as a function, without touching the module's weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners import lora
from torch import nn

from .layer import ScaffoldLayer
from .walk import outside_adapters


def projections(attention: nn.MultiheadAttention) -> dict[str, str]:
    """The matrices of an attention module: the path of each parameter by the name of its projection."""
    inputs = ("in_proj",) if attention._qkv_same_embed_dim else ("q_proj", "k_proj", "v_proj")
    return {**{name: f"{name}_weight" for name in inputs}, "out_proj": "out_proj.weight"}


class _Matrix:
    """One matrix of an attention module, with what a linear layer has."""

    def __init__(self, attention: nn.MultiheadAttention, name: str) -> None:
        self.attention, self.name = attention, name

    def modules(self) -> Iterator[nn.Module]:
        """Those that hold it."""
        return self.attention.modules()

    @property
    def weight(self) -> torch.Tensor:
        return self.attention.get_parameter(projections(self.attention)[self.name])

    @property
    def bias(self) -> torch.Tensor | None:
        output: torch.Tensor | None = self.attention.out_proj.bias
        return output if self.name == "out_proj" else self.attention.in_proj_bias


class ScaffoldProjection(ScaffoldLayer, lora.Linear):  # type: ignore[misc]
    """LottaLoRA over one matrix of an attention module, which asks it for the matrix to multiply with."""

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        out_features, in_features = module.weight.shape
        return in_features, out_features

    def in_place(self) -> dict[str, torch.Tensor]:
        """The weight, and the bias if adapters have one, to compute with instead of the attention module's own."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = self._active()
        if self.disable_adapters or self.merged or not active:
            return {}
        W, bias = self.get_base_layer().weight, self._total_bias(active)
        total = self._summed_weight(active)
        if self.residual[active[0]] and self._keeps_shape:
            total = total + torch.eye(len(total), dtype=total.dtype, device=total.device)
        tensors = {"weight": total.to(W.dtype)}
        if bias is not None and bias is not self.get_base_layer().bias:
            tensors["bias"] = bias
        return tensors


class ScaffoldAttention(nn.Module, lora.LoraLayer):  # type: ignore[misc]
    """`nn.MultiheadAttention` with an adapter on each of its matrices, in place of the module."""

    adapter_layer_names = ()
    other_param_names = ()

    def __init__(self, base_layer: nn.MultiheadAttention, adapter_name: str, config: Any, **kwargs: Any) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        for name in projections(base_layer):
            setattr(self, name, ScaffoldProjection(_Matrix(base_layer, name), adapter_name, config=config, **kwargs))

    def __getattr__(self, name: str) -> Any:
        """What is asked of the attention module (`batch_first`, `in_proj_weight`, ...), it answers."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    @property
    def adapted(self) -> dict[str, ScaffoldProjection]:
        """Its adapted matrices by their path below the attention module."""
        return {path: getattr(self, name) for name, path in projections(self.base_layer).items()}

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """As PEFT's, for each matrix."""
        for layer in self.adapted.values():
            layer.update_layer(*args, **kwargs)

    @property
    def active_adapter(self) -> str | list[str]:
        """That of the adapted matrices."""
        return self.out_proj.active_adapter  # type: ignore[no-any-return]

    @property
    def merged_adapters(self) -> list[str]:
        """Those of the adapted matrices."""
        return self.out_proj.merged_adapters  # type: ignore[no-any-return]

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `nn.MultiheadAttention.forward`."""
        tensors = {
            path.removesuffix("weight") + kind: tensor
            for path, layer in self.adapted.items()
            for kind, tensor in layer.in_place().items()
        }
        result: tuple[torch.Tensor, torch.Tensor | None] = torch.func.functional_call(
            self.base_layer, tensors, args, kwargs
        )
        return result

    def __repr__(self) -> str:
        return f"lottalora.{super().__repr__()}"

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing: each adapted matrix is a layer that merges itself."""

    def unmerge(self) -> None:
        """Nothing: each adapted matrix is a layer that unmerges itself."""

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.MultiheadAttention:
        """The attention module, with its adapters merged into it if `merge`."""
        for layer in self.adapted.values() if merge else ():
            layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.base_layer


def unfuse(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """Keep torch's encoders to the modules they consist of, where an adapter is in one.

    In evaluation `nn.TransformerEncoderLayer` hands its weights to one fused kernel, past every adapter, and
    `nn.TransformerEncoder` nested tensors to such layers. Both look at an attribute first that nothing else reads.

    Returns:
        What was changed: module, attribute and the value to put back when the adapters are gone.
    """
    changed: list[tuple[nn.Module, str, Any]] = []
    for _, module in outside_adapters(model):
        attribute = next((name for kind, name in _LOOKED_AT.items() if isinstance(module, kind)), None)
        if attribute is None or not any(isinstance(part, ScaffoldLayer) for part in module.modules()):
            continue
        if getattr(module, attribute):
            changed.append((module, attribute, getattr(module, attribute)))
            setattr(module, attribute, False)
    return changed


_LOOKED_AT = {nn.TransformerEncoder: "use_nested_tensor", nn.TransformerEncoderLayer: "activation_relu_or_gelu"}
