"""The equation over linear layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import nn

from .functional import ScaledLinear, applied, matmul_dtype
from .layer import ScaffoldLayer


class ScaffoldLinear(ScaffoldLayer, lora.Linear):  # type: ignore[misc]
    """LottaLoRA over `nn.Linear` or transformers' `Conv1D`, and around subclasses that compute the same their way."""

    def _adapted(self, x: torch.Tensor, adapters: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        base = self.get_base_layer()
        x_adapted = x = x.to(matmul_dtype(x))
        per_input = self._magnitude_is_per_input(adapters[0])
        if per_input:
            x_adapted = x * self._magnitude_over_norms(adapters[0])[0].to(x.dtype)
        # Dropout acts on the adapter's input alone, so such an adapter takes its own way, as in PEFT.
        dropped = [name for name in adapters if self.training and not isinstance(self.lora_dropout[name], nn.Identity)]
        fused = [name for name in adapters if name not in dropped]
        beta = self._total_beta(adapters)
        # DoRA's factor per output is for what comes before the bias.
        total_bias = self._total_bias(adapters)
        late_bias = total_bias if adapters[0] in self.lora_magnitude and not per_input else None
        bias = None if late_bias is not None else total_bias
        y: torch.Tensor
        if self.own_forward:
            # f(beta x) is beta f(x), bias aside. It keeps x, as A does; beta f(x) would keep f(x).
            y = base((x_adapted * beta).to(x.dtype), *args, **kwargs)
            A, B, scaling = self._joined(fused)
            if A is not None and B is not None:
                y = y + F.linear(F.linear(x_adapted, A.to(x.dtype)), B.to(x.dtype)) * scaling
            if late_bias is not None:
                y = y - base.bias
            elif bias is not None and bias is not base.bias:
                y = y + (bias if base.bias is None else bias - base.bias)
        else:
            y = self._fused(x_adapted, base.weight, bias, beta, fused)
        for name in dropped:
            A, B = (tensor.to(y.dtype) for tensor in self._pair(name))
            y = y + F.linear(F.linear(self.lora_dropout[name](x_adapted), A), B) * self.scaling[name]
        return self._finished(self._with_magnitude(y, adapters[0], bias=late_bias), x, adapters)

    def _fused(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        beta: torch.Tensor,
        adapters: list[str],
    ) -> torch.Tensor:
        name = adapters[0] if len(adapters) == 1 else None
        y: torch.Tensor
        if name in self.sources:
            A, B, scaling = self.lora_A[name], self.lora_B[name], self.scaling[name]
            y = self.sources[name].linear(A, B, x, weight, bias, beta, scaling, self._weight_is_IO)
        else:
            y = applied(ScaledLinear, x, weight, bias, beta, *self._joined(adapters), self._weight_is_IO)
        return y

    def _joined(self, adapters: list[str]) -> tuple[torch.Tensor | None, torch.Tensor | None, float]:
        if not adapters:
            return None, None, 1.0
        if len(adapters) == 1:
            return *self._pair(adapters[0]), self.scaling[adapters[0]]
        pairs = [self._pair(name) for name in adapters]
        B = [B * self.scaling[name] for name, (_, B) in zip(adapters, pairs, strict=True)]
        return torch.cat([A for A, _ in pairs]), torch.cat(B, dim=1), 1.0

    def _mixed_batch_forward(
        self, x: torch.Tensor, *args: Any, adapter_names: list[str], **kwargs: Any
    ) -> torch.Tensor:
        """`W (beta_i x_i) + scaling_i * B_i A_i x_i` for row i: one product with W, which is read or drawn once."""
        held = [name for name in dict.fromkeys(adapter_names) if self._has(name)]
        if any(not self._is_plain(name) for name in held):
            return super()._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        x = x.to(matmul_dtype(x))
        none = torch.ones(1, device=x.device)
        betas = torch.cat([self.lora_beta[name].value if self._has(name) else none for name in adapter_names])
        y: torch.Tensor = self.base_layer((x * betas.view(-1, *(1 for _ in x.shape[1:]))).to(x.dtype), *args, **kwargs)
        for r, scaling in dict.fromkeys((self.r[name], self.scaling[name]) for name in held):
            alike = {name for name in held if (self.r[name], self.scaling[name]) == (r, scaling)}
            rows = [row for row, name in enumerate(adapter_names) if name in alike]
            # A and B once for each row, (rows, r, I) and (rows, O, r): small beside x, and two products for all.
            A, B = (torch.stack(pairs) for pairs in zip(*(self._pair(adapter_names[row]) for row in rows), strict=True))
            own = x if len(rows) == len(x) else x[rows]
            low_rank = own.reshape(len(rows), -1, x.shape[-1]) @ A.to(x.dtype).mT @ B.to(x.dtype).mT * scaling
            low_rank = low_rank.reshape(len(rows), *y.shape[1:]).to(y.dtype)
            y = y + low_rank if own is x else y.index_add(0, torch.tensor(rows, device=y.device), low_rank)
        return y

    def _is_plain(self, name: str) -> bool:
        """Whether an adapter adds `scaling * B A x` to the scaled product, and nothing else happens to it."""
        return not (
            self.residual[name]
            or self.lora_bias[name]
            or name in {*self.sources, *self.lora_magnitude, *self.lora_norm_weight}
        )
