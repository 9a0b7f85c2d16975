"""The part of a layer that is DoRA's: a magnitude for each output, or each input, over norms of the summed weight."""

from __future__ import annotations

import torch
from peft.tuners import lora

from .adapter_tensor import AdapterTensor
from .functional import without_autocast


class MagnitudeLayer(lora.LoraLayer):  # type: ignore[misc]
    """DoRA (arXiv 2402.09353) over `beta W + scaling * B A`, where an adapter has a magnitude."""

    lora_magnitude: dict[str, AdapterTensor]  # a ModuleDict

    def _magnitude_is_per_input(self, name: str) -> bool:
        return name in self.lora_magnitude and self.lora_magnitude[name].value.dim() > 1

    @torch.no_grad()
    def _norms(self, adapter: str) -> torch.Tensor:
        """Norms of the rows (or columns) of `beta W + scaling * B A` without forming it; in the magnitude's shape."""
        W = self.original_weight()
        W = W.t() if self._weight_is_IO else W.flatten(1)
        exact = torch.promote_types(W.dtype, torch.float32)
        A, B = (tensor.to(exact).flatten(1) for tensor in self._pair(adapter))
        W, A, B = (tensor.unflatten(0, (self._groups, -1)).squeeze(0) for tensor in (W, A, B))
        if self._magnitude_is_per_input(adapter):
            W, A, B = W.mT, B.mT, A.mT
        beta, s = self.lora_beta[adapter].value.to(exact), self.scaling[adapter]
        W = W.to(exact)
        with without_autocast(W):
            cross, low_rank = (W @ A.mT * B).sum(-1), (B @ (A @ A.mT) * B).sum(-1)
            square = beta**2 * W.square().sum(-1) + 2 * beta * s * cross + s**2 * low_rank
        return square.clamp_min(torch.finfo(exact).tiny).sqrt().view_as(self.lora_magnitude[adapter].value)

    @property
    def _groups(self) -> int:
        """Groups of a convolution: its weight is so many matrices, each of some outputs and inputs."""
        return int(getattr(self.get_base_layer(), "groups", 1))

    def _magnitude_over_norms(self, name: str) -> torch.Tensor:
        """DoRA's factor for each output, shape `(O,)`, or each entry of a row, shape `(groups, I / groups, ...)`.

        No gradient passes through the norms, as in PEFT.
        """
        return self.lora_magnitude[name].value / self._norms(name)

    def _with_magnitude_in(self, weight: torch.Tensor, name: str) -> torch.Tensor:
        """Multiply a weight in the layout of W by DoRA's factor."""
        factor = self._magnitude_over_norms(name).to(weight.dtype)
        if not self._magnitude_is_per_input(name):
            factor = factor.view(-1, *(1 for _ in weight.shape[1:]))
        elif self._groups > 1:
            factor = factor.repeat_interleave(len(weight) // self._groups, dim=0)
        return weight * (factor.t() if self._weight_is_IO else factor)

    def _with_magnitude(
        self, y: torch.Tensor, name: str, channels: int = -1, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Multiply y by DoRA's factor per output, if on, and add the bias; `channels` is the dimension of outputs."""
        shape = [1] * y.dim()
        shape[channels] = -1
        if name in self.lora_magnitude and not self._magnitude_is_per_input(name):
            y = y * self._magnitude_over_norms(name).to(y.dtype).view(shape)
        return y if bias is None else y + bias.to(y.dtype).view(shape)
