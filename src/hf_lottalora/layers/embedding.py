"""The equation over an embedding, and over a head that is tied to it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..residency.foreign import in_memory
from .functional import ScaledEmbedding, ScaledLinear, matmul_dtype
from .layer import ScaffoldLayer


class ScaffoldEmbedding(ScaffoldLayer, lora.Embedding):  # type: ignore[misc]
    """LottaLoRA over `nn.Embedding`: row i is `beta * E[i] + scaling * A[:, i]^T B^T`."""

    def _pair(self, adapter_name: str) -> tuple[nn.Parameter, nn.Parameter]:
        return self.lora_embedding_A[adapter_name], self.lora_embedding_B[adapter_name]

    def _adapted(self, x: torch.Tensor, adapters: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        beta, base = self._total_beta(adapters), self.base_layer
        y: torch.Tensor
        if any(parameter.requires_grad for parameter in base.parameters()):
            rows = base(x)
            y = rows * beta.to(rows.dtype)
        else:
            y = ScaledEmbedding.apply(beta, x, base.weight, base)
        scale = self._get_embed_scale()
        for name in adapters:
            A, B = (tensor.to(y.dtype) for tensor in self._pair(name))
            low_rank = F.linear(F.embedding(x, A.t()), B) * self.scaling[name]
            y = y + (low_rank if scale is None else low_rank * scale.to(y.dtype))
        return y


class TiedHead(nn.Module, BaseTunerLayer):
    """An output layer that shares weight *and* adapter with the input embedding, so that the two stay tied."""

    embedding: ScaffoldEmbedding

    def __init__(self, base_layer: nn.Module, embedding: ScaffoldEmbedding) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.__dict__["embedding"] = embedding  # not a submodule: its parameters are listed once, over there

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(..., I) -> (..., vocabulary)`."""
        embedding = self.embedding
        adapters = embedding._active()
        if embedding.disable_adapters or embedding.merged or not adapters:
            result: torch.Tensor = self.base_layer(x)
            return result
        with in_memory(self, embedding) if hasattr(self.base_layer, "_hf_hook") else nullcontext():
            return self._adapted(x, adapters)

    def _adapted(self, x: torch.Tensor, adapters: list[str]) -> torch.Tensor:
        embedding = self.embedding
        x = x.to(matmul_dtype(x))
        beta, base = embedding._total_beta(adapters), self.base_layer
        # The embedding's row i is beta E[i] + s A[:, i]^T B^T: as a linear layer, its A and B change places.
        A = torch.cat([embedding._pair(name)[1].t() * embedding.scaling[name] for name in adapters])
        B = torch.cat([embedding._pair(name)[0].t() for name in adapters], dim=1)
        y: torch.Tensor = ScaledLinear.apply(x, base.weight, base.bias, beta, A, B, 1.0, False)
        return y

    def __repr__(self) -> str:
        base = self.base_layer
        return f"lottalora.TiedHead({base.in_features} -> {base.out_features}, the adapter of the input embedding)"

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing: the embedding merges the weight they share."""

    def unmerge(self) -> None:
        """Nothing: the embedding restores the weight they share."""
