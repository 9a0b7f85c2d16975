"""A layer in one line, for `print(model)`."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..residency.forms import VirtualWeight


def described(layer: Any) -> str:
    """Sizes, seed, family, rank, beta policy and residency of an adapted layer, and what is special about it."""
    base = layer.get_base_layer()
    sizes = (base.num_embeddings, base.embedding_dim) if isinstance(base, nn.Embedding) else None
    d_in, d_out = sizes or (layer.in_features, layer.out_features)
    parts = [f"{d_in} -> {d_out}"]
    for name, usual in (("kernel_size", None), ("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1)):
        value = getattr(base, name, usual)
        value = value[0] if isinstance(value, tuple) and len(set(value)) == 1 else value
        parts += [f"{name}={value}"] if value != usual else []
    parts += ["bias"] if getattr(base, "bias", None) is not None else []
    parts += ["own forward"] if layer.own_forward else []
    drawn = layer.scaffold
    parts += ["kept"] if drawn is None else [f"seed={drawn.seed}", drawn.family]
    adapters = {name: ", ".join(_adapter(layer, name)) for name in layer.lora_beta}
    several = len(adapters) > 1
    parts += [f"{name}({text})" if several else text for name, text in adapters.items()]
    parts.append(base.weight.residency if isinstance(base.weight, VirtualWeight) else "dense")
    parts += [f"merged {layer.merged_adapters}"] if layer.merged else []
    parts += ["disabled"] if layer.disable_adapters else []
    return f"lottalora.{type(base).__name__}({', '.join(parts)})"


def _adapter(layer: Any, name: str) -> list[str]:
    r = "sqrt(r)" if layer.use_rslora[name] else "r"
    fixed = "lora_beta" in layer.frozen_peft_weight_names.get(name, ())
    source = layer.sources.get(name)
    parts = [] if source is None else [str(source)]
    parts += [f"r={layer.r[name]}", f"alpha/{r}={layer.scaling[name]:g}", f"beta {'fixed' if fixed else 'trained'}"]
    if name in layer.lora_magnitude:
        parts.append("DoRA by input" if layer._magnitude_is_per_input(name) else "DoRA")
    parts += ["residual"] if layer.residual[name] and layer._keeps_shape else []
    parts += ["layer_norm"] if name in layer.lora_norm_weight else []
    dropout = getattr(layer.lora_dropout[name], "p", 0.0)
    return [*parts, f"dropout={dropout:g}"] if dropout else parts
