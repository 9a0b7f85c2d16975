"""Where kernels of ours run: on CUDA devices with Triton. Elsewhere the CPU makes the same values and copies them."""

from __future__ import annotations

import importlib.util
import warnings
from functools import cache
from types import ModuleType

import torch

DEVICE_TYPES = ("cuda",)


def kernels_for(device: torch.device) -> ModuleType | None:
    """`triton_kernels`, where they run on this device."""
    if device.type not in DEVICE_TYPES or not _has_triton():
        return None
    from . import triton_kernels

    return triton_kernels


@cache
def _has_triton() -> bool:
    found = importlib.util.find_spec("triton") is not None
    if not found:
        warnings.warn(
            "Triton is not installed, so scaffolds are drawn on the CPU and copied to the GPU: the same values, later. "
            "`pip install triton` draws them there.",
            stacklevel=2,
        )
    return found
