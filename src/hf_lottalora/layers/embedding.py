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
from .functional import ScaledEmbedding, ScaledLinear, applied, matmul_dtype
from .layer import ScaffoldLayer
from .mixed import RowAdapters
from .rows import TrainedRows


class ScaffoldEmbedding(ScaffoldLayer, lora.Embedding):  # type: ignore[misc]
    """LottaLoRA over `nn.Embedding`: row i is `beta * E[i] + scaling * A[:, i]^T B^T`.

    DoRA's magnitude is per column of E ("outputs") or per row ("inputs").
    """

    def _pair(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.lora_embedding_A[adapter_name], self.lora_embedding_B[adapter_name]

    def _adapted(self, x: torch.Tensor, adapters: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        beta, base = self._total_beta(adapters), self.base_layer
        y: torch.Tensor
        if any(parameter.requires_grad for parameter in base.parameters()):
            rows = base(x)
            y = rows * beta.to(rows.dtype)
        else:
            y = applied(ScaledEmbedding, beta, x, base.weight, base)
        scale, padding = self._get_embed_scale(), self.get_base_layer().padding_idx
        for name in adapters:
            A, B = (tensor.to(y.dtype) for tensor in self._pair(name))
            low_rank = F.linear(F.embedding(x, A.t(), padding), B) * self.scaling[name]
            y = y + (low_rank if scale is None else low_rank * scale.to(y.dtype))
        if self._magnitude_is_per_input(adapters[0]):
            return y * F.embedding(x, self._magnitude_over_norms(adapters[0]).t(), padding).to(y.dtype)
        return self._with_magnitude(y, adapters[0])

    def as_head(self, x: torch.Tensor, adapters: list[str], bias: torch.Tensor | None) -> torch.Tensor:
        """Multiply with the adapted table: `(..., O) -> (..., vocabulary)`."""
        x = x.to(matmul_dtype(x))
        per_input = self._magnitude_is_per_input(adapters[0])
        if not per_input:
            x = self._with_magnitude(x, adapters[0])
        # Row i is beta E[i] + s A[:, i]^T B^T: as a linear layer, A and B change places.
        A = torch.cat([self._pair(name)[1].t() * self.scaling[name] for name in adapters])
        B = torch.cat([self._pair(name)[0].t() for name in adapters], dim=1)
        beta, weight = self._total_beta(adapters), self.get_base_layer().weight
        y = applied(ScaledLinear, x, weight, None if per_input else bias, beta, A, B, 1.0, False)
        if per_input:
            y = y * self._magnitude_over_norms(adapters[0])[0].to(y.dtype)
            y = y if bias is None else y + bias.to(y.dtype)
        return y


class TiedHead(nn.Module, BaseTunerLayer):
    """An output layer that shares weight *and* adapter with the input embedding, so that the two stay tied."""

    embedding: ScaffoldEmbedding | TrainedRows

    def __init__(self, base_layer: nn.Module, embedding: ScaffoldEmbedding | TrainedRows) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.__dict__["embedding"] = embedding  # not a submodule: its parameters are listed once, over there

    def forward(self, x: torch.Tensor, adapter_names: list[str] | None = None) -> torch.Tensor:
        """`(..., I) -> (..., vocabulary)`, of `adapter_names` one for each row, if any are given."""
        if adapter_names is None or self.embedding.disable_adapters:
            return self._with(self.embedding._active(), x)
        return RowAdapters.of(adapter_names).apart(
            lambda name, rows: self._with([name] if self.embedding._has(name) else [], x[rows]), x.device
        )

    def _with(self, adapters: list[str], x: torch.Tensor) -> torch.Tensor:
        embedding = self.embedding
        if embedding.disable_adapters or embedding.merged or not adapters:
            result: torch.Tensor = self.base_layer(x)
            return result
        with in_memory(self, embedding) if hasattr(self.base_layer, "_hf_hook") else nullcontext():
            bias: Any = self.base_layer.bias
            return embedding.as_head(x, adapters, bias)

    def __repr__(self) -> str:
        base = self.base_layer
        return f"lottalora.TiedHead({base.in_features} -> {base.out_features}, the adapter of the input embedding)"

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing: the embedding merges the weight they share."""

    def unmerge(self) -> None:
        """Nothing: the embedding restores the weight they share."""
