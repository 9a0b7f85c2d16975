"""Some rows of an embedding trained as they are, over a table that is frozen (PEFT's `trainable_token_indices`).

Shapes: table E `(vocabulary, O)`, an adapter's n rows `(n, O)`, which take the place of those of E for their ids, in
the embedding and in a head that is tied to it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import nn

from .functional import matmul_dtype
from .layer import ScaffoldLayer


class TrainedRows(ScaffoldLayer, lora.Embedding):  # type: ignore[misc]
    """`nn.Embedding` with rows of the adapters' own for some ids. There is no A, B or beta."""

    adapter_layer_names = (*ScaffoldLayer.adapter_layer_names, "lora_rows")
    other_param_names = (*ScaffoldLayer.other_param_names, "ids")

    def __init__(self, base_layer: nn.Embedding, adapter_name: str, config: Any, target_name: str, **_: Any) -> None:
        nn.Module.__init__(self)
        lora.LoraLayer.__init__(self, base_layer)
        for kind in self.own_tensors:  # of which there are none
            self.register_module(kind, nn.ModuleDict())
        self.frozen_peft_weight_names, self.residual, self.sources, self._made = {}, {}, {}, set()
        self.lora_rows = nn.ParameterDict()
        self.ids: dict[str, torch.Tensor] = {}
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, 0, 0, config, target_name=target_name)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        """Make an adapter's rows; the plan says which."""
        (rows,) = (adapter.rows for adapter in config._plan.adapters if adapter.path == kwargs["target_name"])
        self._made.discard(adapter_name)
        self.ids[adapter_name] = torch.tensor(rows)
        self.lora_rows[adapter_name] = nn.Parameter(torch.empty(len(rows), self.out_features))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        self._made.add(adapter_name)

    def init_adapter(self, adapter_name: str, path: str, seed: int, zero_B: bool) -> None:
        """Start with the table's own rows."""
        self.lora_rows[adapter_name].data.copy_(F.embedding(self._ids(adapter_name), self.original_weight()))

    def _has(self, adapter_name: str) -> bool:
        return adapter_name in self.lora_rows

    def _ids(self, adapter_name: str) -> torch.Tensor:
        """The ids of an adapter's rows, in order, where the table is."""
        ids = self.ids[adapter_name] = self.ids[adapter_name].to(self.get_base_layer().weight.device)
        return ids

    def _check_together(self, adapters: list[str]) -> None:
        if len(adapters) < 2:
            return
        ids = torch.cat([self._ids(name) for name in adapters])
        if len(ids) != len(ids.unique()):
            raise ValueError(f"Adapters {adapters} cannot be active together: they train rows of the same tokens.")

    def _adapted(self, x: torch.Tensor, adapters: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        y: torch.Tensor = self.base_layer(x)
        scale = self._get_embed_scale()
        for name in adapters:
            ids, rows = self._ids(name), self.lora_rows[name].to(y.dtype)
            at = torch.searchsorted(ids, x.long()).clamp(max=len(ids) - 1)
            own = F.embedding(at, rows if scale is None else rows * scale.to(y.dtype))
            y = torch.where((ids[at] == x).unsqueeze(-1), own, y)
        return y

    def as_head(self, x: torch.Tensor, adapters: list[str], bias: torch.Tensor | None) -> torch.Tensor:
        """Multiply with the table and the adapters' rows: `(..., O) -> (..., vocabulary)`."""
        x = x.to(matmul_dtype(x))
        y = F.linear(x, self.get_base_layer().weight, bias)
        for name in adapters:
            ids, rows = self._ids(name), self.lora_rows[name].to(x.dtype)
            y = y.index_copy(-1, ids, F.linear(x, rows, None if bias is None else bias[ids]))
        return y

    def merged_weight(self, adapters: list[str]) -> torch.Tensor:
        original = self._original_values()
        merged = original.to(torch.promote_types(original.dtype, torch.float32), copy=True)
        for name in adapters:
            merged[self._ids(name)] = self.lora_rows[name].detach().to(merged.dtype)
        return merged

    def scaled_weight(self, adapter: str) -> torch.Tensor:
        """The table with the adapter's rows: there is nothing else of it."""
        return self.merged_weight([adapter])

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """What merging adds to the table: nothing but for the adapter's rows."""
        merged = self.merged_weight([adapter])
        return merged - self.original_weight().to(merged.dtype)
