"""How an artifact's file holds what is trained: exactly, in half precision, or as 8-bit codes with scales.

Which forms a tensor can have depends on its place in the plan and on its size alone. What is kept, and integers, are
always exact. Here are names, shapes and bytes; `artifact.stored` makes the values.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..options import SaveDtype
from .survey import SurveyedTensor

# Keys in the adapter file: the factors of all 8-bit codes, bfloat16, and the numbers of all rows, int32, each of shape
# `(n,)`, tensor after tensor in the order of their keys. One entry each would be longer than what is in it.
SCALES_KEY, ROWS_KEY = "lottalora_scales", "lottalora_rows"

# Likewise of each of these one tensor with those of all layers, where A and B are not trained themselves.
STACKED_KEY, STACKED = "lottalora_stacked", ("lora_beta", "lora_A.coefficients", "lora_B.coefficients")

FORMS: dict[SaveDtype, torch.dtype] = {"float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}

_SMALLEST = 16  # elements; betas above all. Less than the entry in the header has bytes

# Of an adapter's tensors: what they are called together, and the dimension along which scales run, if they have any.
_OF_ADAPTERS: dict[str, tuple[str, int | None]] = {
    "lora_A.weight": ("A and B", 0),
    "lora_B.weight": ("A and B", 1),
    "lora_A.gamma": ("coefficients", 0),
    "lora_B.lambda": ("coefficients", 0),
    "lora_A.coefficients": ("coefficients", None),
    "lora_B.coefficients": ("coefficients", None),
    "lora_embedding_A": ("A and B", 0),
    "lora_embedding_B": ("A and B", 1),
    "lora_rows": ("embeddings", 0),
    "lora_beta": ("beta", None),
    "lora_magnitude": ("magnitudes", None),
    "lora_norm_weight": ("norms", None),
    "lora_norm_bias": ("norms", None),
    "lora_B.bias": ("biases", None),
}
_OF_KINDS = {"embedding": "embeddings", "norm": "norms", "bias": "biases", "parameter": "parameters"}

SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Shrinkable:
    """A tensor that may be stored in fewer bytes.

    Attributes:
        group: what it is called, with others, where it is said how much is lost.
        shape: its own.
        scales: shape of the factors that its 8-bit codes are multiplied by: one for each row, or for each column of B,
            so that each of the r directions has its own. None: it has no codes.
    """

    group: str
    shape: tuple[int, ...]
    scales: tuple[int, ...] | None = None

    def form(self, dtype: torch.dtype, wanted: SaveDtype | None) -> SaveDtype | None:
        """How it is stored where `wanted` is asked for: the smallest of that, float16 and, None, as it is."""
        numel = math.prod(self.shape)
        if wanted is None or numel < _SMALLEST or not dtype.is_floating_point:
            return None
        if wanted == "int8":
            size = numel + torch.bfloat16.itemsize * math.prod(self.scales or self.shape)
            if size < numel * min(dtype.itemsize, torch.float16.itemsize):
                return wanted
            wanted = "float16"
        return wanted if FORMS[wanted].itemsize < dtype.itemsize else None

    def scales_of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales where only some of its rows are stored, in this shape."""
        assert self.scales is not None
        return self.scales if shape == self.shape else (shape[0], *self.scales[1:])


def of_adapter(name: str, shape: tuple[int, ...]) -> Shrinkable:
    """The tensor of an adapter with this name."""
    group, dimension = _OF_ADAPTERS[name]
    scales = tuple(size if at == dimension else 1 for at, size in enumerate(shape))
    return Shrinkable(group, shape, None if dimension is None else scales)


def of_trained(tensor: SurveyedTensor) -> Shrinkable:
    """A trained tensor of the base model. What holds several matrices has scales for the rows of each."""
    shape, rows = tensor.shape, len(tensor.shape) - 1
    if tensor.kind != "parameter" and tensor.stacked == 1:
        rows = min(rows, 1)  # of a kernel, all that makes one output
    group = _OF_KINDS.get(tensor.kind, "head" if tensor.in_head else "matrices")
    return Shrinkable(group, shape, (*shape[:rows], *(1 for _ in shape[rows:])) if rows > 0 else None)


# ---- what the manifest says of it ------------------------------------------------------------------------------------


def described(
    dtype: SaveDtype | None,
    forms: Mapping[str, SaveDtype | None],
    tables: Mapping[str, Mapping[str, Any]],
    loss: Mapping[str, tuple[float, float]],
    stacked: Iterable[str] = (),
) -> dict[str, Any] | None:
    """What the manifest says of the forms, None where every tensor is as it is.

    Args:
        dtype: what was asked for.
        forms: of every `Shrinkable`, by key. Where all layers have the same one, it is said once, with stars for the
            numbers of layers.
        tables: those of which some rows are stored, by key: how many, and how the others are drawn.
        loss: by group, relative and largest error.
        stacked: keys of those in which layers are stacked.
    """
    alike: dict[str, dict[str, SaveDtype | None]] = {}
    for key, form in forms.items():
        alike.setdefault(_pattern(key), {})[key] = form
    said: dict[str, SaveDtype] = {}
    for pattern, each in alike.items():
        first, *others = set(each.values())
        said |= {key: form for key, form in (each if others else {pattern: first}).items() if form}
    stacked = sorted(stacked)
    if not said and not tables and not stacked:
        return None
    return {
        **({"stacked": stacked} if stacked else {}),
        "dtype": dtype if said else None,
        "forms": said,
        "tables": {key: dict(table) for key, table in tables.items()},
        "loss": {group: list(errors) for group, errors in loss.items()},
    }


def form_in(said: Mapping[str, SaveDtype], key: str) -> SaveDtype | None:
    """The form of a tensor, by what is said of the forms."""
    return said.get(key, said.get(_pattern(key)))


def names_of(key: str) -> tuple[str, str]:
    """Under which `form_in` looks."""
    return key, _pattern(key)


def _pattern(key: str) -> str:
    return re.sub(r"\d+", "*", key)


def file_bytes(entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> int:
    """Size of a safetensors file with tensors of these dtypes and shapes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for key, (dtype, shape) in entries.items():
        size = math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": SAFETENSORS_NAMES[dtype], "shape": shape, "data_offsets": [at, at + size]}
        at += size
    return at + 8 + -(-len(json.dumps(header, separators=(",", ":"))) // 8) * 8
