"""The forms in which a scaffold weight can be held, and which of them a scaffold allows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import get_args

import torch

from ..scaffold.tensor import ScaffoldTensor
from . import shards, virtual_operations  # noqa: F401  # what a virtual weight does without all its values
from .int4 import is_ternary
from .virtual_weight import Residency, VirtualWeight, held_by

__all__ = ["Residency", "VirtualWeight", "check_residency", "resident"]


def resident(
    scaffold: ScaffoldTensor, residency: Residency, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """The tensor in one of these forms, shape `scaffold.shape`."""
    if residency == "dense":
        return scaffold.draw(dtype, device)
    words, codes = held_by(scaffold, residency, device)
    return VirtualWeight(scaffold, words, (dtype,), device, codes=codes)


def check_residency(residency: object, families: Iterable[str] = ()) -> Residency:
    """Return it.

    Raises:
        ValueError: it is none, or a scaffold of one of these families cannot be held so.
    """
    if residency not in get_args(Residency):
        raise ValueError(f"residency must be one of {list(get_args(Residency))}, got {residency!r}.")
    other = sorted({family for family in families if residency == "int4" and not is_ternary(family)})
    if other:
        raise ValueError(
            f"residency='int4' is for weights of at most three values -a, 0 and a, such as family 'binary' or "
            f"'ternary', not {', '.join(map(repr, other))}. Use 'packed'."
        )
    return residency  # type: ignore[return-value]
