"""LottaLoRA over `nn.Conv1d`, `2d` and `3d`: the kernel as a matrix (paper section 1), applied as convolutions.

Shapes: W `(O, I / groups, *kernel)`, A `(r, I / groups, *kernel)`, B `(O, r / groups, 1, ...)`. A has the stride,
padding, dilation and groups of W, so that B A is a kernel of W's shape, also with groups.

A convolution reads its input often and its kernel is small, so it mostly pays to sum the kernels, `beta W + (alpha/r)
B A`, and convolve once, which costs what full training does; `_one_kernel_is_cheaper` decides (ours).
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import _ConvNd
from torch import nn
from torch.func import functional_call

from .functional import ScaledConv, applied, matmul_dtype
from .layer import ScaffoldLayer


class ScaffoldConv(ScaffoldLayer, _ConvNd):  # type: ignore[misc]
    """`beta * conv(x, W) + scaling * B(A(x)) + bias`."""

    def __init__(self, base_layer: Any, *args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():  # with groups: that merging is not supported; here it is
            warnings.filterwarnings("ignore", "LoRA adapter added to ConvNd layer with groups")
            super().__init__(base_layer, *args, **kwargs)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        """As PEFT's, but A has the groups, dilation and padding mode of the layer too."""
        base = self.get_base_layer()
        # PEFT builds A and B by the layer's class, and a subclass may take other arguments.
        kind = next(kind for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(base, kind))
        plain: Any = kind.__new__(kind)
        plain.__dict__ = base.__dict__
        self._modules["base_layer"] = plain
        try:
            super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)
        finally:
            self._modules["base_layer"] = base
        if config.adapter != "lora":
            return
        options = {name: getattr(base, name) for name in ("stride", "padding", "dilation", "groups", "padding_mode")}
        A = kind(base.in_channels, r, base.kernel_size, bias=False, **options)
        self.lora_A[adapter_name] = A.to(self.lora_B[adapter_name].weight.dtype)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def pair_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        base = self.get_base_layer()
        return (r, *base.weight.shape[1:]), (base.out_channels, r // base.groups, *(1 for _ in base.kernel_size))

    def _pair(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        A, B = super()._pair(adapter_name)
        if A.dim() == 2:  # RandLoRA's, which knows matrices
            A, B = A.reshape(-1, *self.pair_shapes(1)[0][1:]), B[(...,) + (None,) * (self.weight.dim() - 2)]
        return A, B

    def _product(self, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        base = self.get_base_layer()
        A, B = A.reshape(base.groups, -1, A[0].numel()), B.reshape(base.groups, -1, B[0].numel())
        return (B @ A).reshape(base.weight.shape)

    def _adapted(self, x: torch.Tensor, adapters: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.own_forward:  # with whatever padding: linear in the kernel
            base = self.get_base_layer()
            tensors, bias = {"weight": self._summed_weight(adapters).to(base.weight.dtype)}, self._total_bias(adapters)
            if bias is not None and base.bias is not None:
                tensors["bias"], bias = bias, None
            adapted: torch.Tensor = functional_call(base, tensors, (x, *args), kwargs)
            return adapted if bias is None else adapted + bias.view(-1, *(1 for _ in base.kernel_size))
        x = x.to(matmul_dtype(x))
        dropout = self.training and any(not isinstance(self.lora_dropout[name], nn.Identity) for name in adapters)
        if self._magnitude_is_per_input(adapters[0]) or (not dropout and self._one_kernel_is_cheaper(adapters)):
            base = self.get_base_layer()
            bias = self._total_bias(adapters)
            bias = None if bias is None else bias.to(x.dtype)
            y: torch.Tensor = base._conv_forward(x, self._summed_weight(adapters).to(x.dtype), bias)
        else:
            y = self._convolved_apart(x, adapters)
        return self._finished(y, x, adapters, channels=self._channels)

    @property
    def _channels(self) -> int:
        return -1 - len(self.get_base_layer().kernel_size)

    def _one_kernel_is_cheaper(self, adapters: list[str]) -> bool:
        """Compare multiplications per output pixel, forward and backward, with K inputs to each of O outputs.

        One kernel: 3 O K. Apart: 2 O K + 3 r (O + K), where a few channels cost as much as 16 (a vector register).
        """
        weight = self.get_base_layer().weight
        outputs, inputs = weight.shape[0], weight[0].numel()
        r = max(16, sum(self.r[name] for name in adapters))
        return bool(3 * r * (outputs + inputs) >= outputs * inputs)

    def _convolved_apart(self, x: torch.Tensor, adapters: list[str]) -> torch.Tensor:
        base = self.get_base_layer()
        unbatched = x.dim() < base.weight.dim()
        rows = x.unsqueeze(0) if unbatched else x
        padding: Any = base.padding
        if base.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if base.padding_mode == "zeros" else base.padding_mode
            rows = F.pad(rows, base._reversed_padding_repeated_twice, mode=mode)
            padding = (0,) * len(base.kernel_size)
        y = applied(
            ScaledConv, rows, base.weight, self._total_beta(adapters), base.stride, padding, base.dilation, base.groups
        )
        y = y.squeeze(0) if unbatched else y
        for name in adapters:
            A, B = (tensor.to(x.dtype) for tensor in self._pair(name))
            hidden = base._conv_forward(self.lora_dropout[name](x), A, None)
            conv = (F.conv1d, F.conv2d, F.conv3d)[len(base.kernel_size) - 1]
            y = y + conv(hidden, B, groups=base.groups) * self.scaling[name]
        return self._with_magnitude(y, adapters[0], channels=self._channels, bias=self._total_bias(adapters))

    @property
    def _keeps_shape(self) -> bool:
        base = self.get_base_layer()
        around = base._reversed_padding_repeated_twice  # before and after each dimension, the last one first
        padding = [before + after for before, after in zip(around[::2], around[1::2], strict=True)][::-1]
        spread = [d * (k - 1) for d, k in zip(base.dilation, base.kernel_size, strict=True)]
        return super()._keeps_shape and padding == spread and set(base.stride) == {1}

    def _dirac(self, kernel: torch.Tensor) -> torch.Tensor:
        if any(k % 2 == 0 for k in self.get_base_layer().kernel_size):
            raise ValueError("The residual of a convolution with an even kernel cannot be merged: it has no centre.")
        return nn.init.dirac_(kernel, self.get_base_layer().groups)
