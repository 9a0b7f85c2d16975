"""The part of a layer that merges adapters into its base weight, and takes them out again, to the bit."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from ..residency.foreign import is_foreign, values_of
from ..residency.virtual_weight import VirtualWeight
from ..scaffold.tensor import ScaffoldTensor


class MergingLayer(lora.LoraLayer):  # type: ignore[misc]
    """Merging over PEFT's: what is drawn can be drawn again, so only what cannot is kept beside the merged weight."""

    # How the base weight was drawn; None where a pretrained weight was kept.
    scaffold: ScaffoldTensor | None = None
    # The base weight while adapters are merged into its place, where it cannot be drawn again: a pretrained one that
    # was kept, or a drawn one that a cast to a smaller dtype has rounded.
    _unmerged_weight: torch.Tensor | None = None
    # The same of the base bias, where an adapter that is merged has a bias too.
    _unmerged_bias: torch.Tensor | None = None

    def original_bias(self) -> torch.Tensor:
        """The base bias without any adapter."""
        bias: torch.Tensor = self.get_base_layer().bias
        return bias.detach() if self._unmerged_bias is None else self._unmerged_bias

    def original_weight(self) -> torch.Tensor:
        """The base weight without any adapter, in the dtype it is held in: drawn again, or the kept one."""
        weight = self.get_base_layer().weight
        if not self.merged:
            return values_of(weight.detach())
        if self._unmerged_weight is not None:
            return values_of(self._unmerged_weight)
        if self.scaffold is None:
            raise RuntimeError("The weight under a merged adapter is gone; load the base model again.")
        return self.scaffold.draw(weight.dtype, weight.device)

    def _original_values(self) -> torch.Tensor:
        """The same as an ordinary tensor, so that a weight that is not in memory is drawn once for all that follows."""
        original = self.original_weight()
        return original.dense() if isinstance(original, VirtualWeight) else original

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """What merging adds to W: `(beta - 1) W + scaling * B A`, with DoRA's magnitude and the residual if on.

        In float32 (float64 for a float64 layer), in the layout of W.
        """
        return self._delta(self.original_weight(), adapter)

    @torch.no_grad()
    def _delta(self, original: torch.Tensor, adapter: str) -> torch.Tensor:
        exact = torch.promote_types(original.dtype, torch.float32)
        A, B = (tensor.detach().to(exact) for tensor in self._pair(adapter))
        beta = self.lora_beta[adapter].value.detach().to(exact)
        delta = self._product(A, B).mul_(self.scaling[adapter])
        for rows, drawn in _together(delta, original):
            rows.add_(beta * drawn)
        if adapter in self.lora_magnitude:
            delta = self._with_magnitude_in(delta, adapter)
        if self.residual[adapter] and self._keeps_shape:
            identity = torch.empty_like(delta)
            delta += nn.init.eye_(identity) if delta.dim() == 2 else self._dirac(identity)
        for rows, drawn in _together(delta, original):
            rows.sub_(drawn)
        return delta

    def check_mergeable(self, adapters: list[str]) -> None:
        """Whether `merge` could add these adapters to those it has merged. Changes nothing.

        Raises:
            ValueError: an adapter has a LayerNorm, or a bias where the layer has none, or a residual that no kernel can
                contain, or several do not add up.
        """
        self._check_together([*self.merged_adapters, *adapters])
        if any(name in self.lora_norm_weight for name in adapters):
            raise ValueError(f"Adapters {adapters} have a LayerNorm after the layer, which no weight can contain.")
        if any(self.lora_bias.get(name) for name in adapters) and self.get_base_layer().bias is None:
            raise ValueError(f"Adapters {adapters} have lora_bias=True, and the layer has no bias to merge it into.")
        shape = self.get_base_layer().weight.shape
        if any(self.residual.get(name) for name in adapters) and self._keeps_shape and len(shape) > 2:
            self._dirac(torch.empty(shape, device="meta"))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """W <- beta W + scaling * B A, summed in float32 and rounded once.

        Raises:
            ValueError: as `check_mergeable`, the weight is of a class that PEFT cannot quantise again, or with
                `safe_merge` the merged weight is not finite; nothing was changed.
        """
        adapters = [name for name in check_adapters_to_merge(self, adapter_names) or [] if self._has(name)]
        if not adapters:
            return
        self.check_mergeable(adapters)
        weight = self.get_base_layer().weight
        quantised = is_foreign(weight)
        if quantised and self.quantization_backend is None:
            raise ValueError(
                f"The base weight is a {type(weight).__name__}, and nothing says how to quantise what is merged. Load "
                "the base model with transformers' quantization_config (torchao), or without quantisation."
            )
        original = self.original_weight()
        merged = self.merged_weight([*self.merged_adapters, *adapters])
        bias = self.merged_bias([*self.merged_adapters, *adapters])
        if safe_merge and not (torch.isfinite(merged).all() and (bias is None or torch.isfinite(bias).all())):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {adapters} seems to be broken")
        if not self.merged and not (self.scaffold is not None and self.scaffold.is_in(original)):
            self._unmerged_weight = weight.detach() if quantised else original.clone()
        if quantised:
            self.set_base_weight(nn.Parameter(merged.to(weight.dtype), requires_grad=False))
        else:
            with torch.no_grad():  # not by way of .data: the backward pass of an earlier forward pass must be an error
                weight.copy_(merged)
        if bias is not None:
            self._unmerged_bias = self.original_bias().clone()
            with torch.no_grad():
                self.get_base_layer().bias.copy_(bias)
        self.merged_adapters.extend(adapters)

    def merged_weight(self, adapters: list[str]) -> torch.Tensor:
        """What merging these adapters, and no others, makes of the base weight, at least float32. Changes nothing."""
        original = merged = self._original_values()
        for name in adapters:
            delta = self._delta(original, name)
            for rows, before in _together(delta, merged):
                rows.add_(before)
            merged = delta
        return merged.to(torch.promote_types(original.dtype, torch.float32))

    def scaled_weight(self, adapter: str) -> torch.Tensor:
        """`beta W`, at least float32: over it plain LoRA with this adapter's A and B computes the same."""
        original = self._original_values()
        return self.lora_beta[adapter].value.detach() * original.to(torch.promote_types(original.dtype, torch.float32))

    def merged_bias(self, adapters: list[str]) -> torch.Tensor | None:
        """What it makes of the base bias, None where no adapter has a bias."""
        if not any(self.lora_bias.get(name) for name in adapters):
            return None
        bias = self.original_bias()
        bias = bias.to(torch.promote_types(bias.dtype, torch.float32))
        for name in adapters:
            if self.lora_bias[name]:
                bias = bias + self.scaling[name] * self.lora_B[name].bias.detach().to(bias.dtype)
        return bias

    def unmerge(self) -> None:
        """Back to the weight before merging, to the bit."""
        if not self.merged:
            super().unmerge()  # warns
            return
        if self._unmerged_weight is not None and is_foreign(self._unmerged_weight):
            self.get_base_layer().weight = nn.Parameter(self._unmerged_weight, requires_grad=False)
        else:
            with torch.no_grad():
                self.get_base_layer().weight.copy_(self.original_weight())
        if self._unmerged_bias is not None:
            with torch.no_grad():
                self.get_base_layer().bias.copy_(self._unmerged_bias)
        self.merged_adapters.clear()
        self._unmerged_weight = self._unmerged_bias = None


def _together(one: torch.Tensor, other: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The same rows of two tensors, some at a time: a weight can be the largest tensor there is, and have no copy."""
    step = max(1, (1 << 20) * len(one) // max(1, one.numel()))
    return zip(one.split(step), other.split(step), strict=True)
