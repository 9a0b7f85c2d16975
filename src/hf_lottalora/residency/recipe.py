"""A weight that is not in memory as a small ordinary tensor, for state dicts: what to draw, instead of its values."""

from __future__ import annotations

import dataclasses
import json

import torch

from ..scaffold.draw import FORMAT_VERSION
from ..scaffold.families import get_family
from ..scaffold.tensor import ScaffoldTensor

_MARK = b"lottalora recipe "


def recipe_of(scaffold: ScaffoldTensor) -> torch.Tensor:
    """What is drawn, as JSON in a uint8 tensor of shape `(bytes,)`: torch.save, safetensors and Accelerate take it."""
    described = json.dumps({**dataclasses.asdict(scaffold), **_identity(scaffold)}, sort_keys=True)
    return torch.frombuffer(bytearray(_MARK + described.encode()), dtype=torch.uint8)


def read_recipe(tensor: torch.Tensor) -> ScaffoldTensor | None:
    """What `recipe_of` has described, or None where the tensor is anything else.

    Raises:
        ValueError: it was written for another format, or for a family that has other values here.
    """
    if tensor.dtype != torch.uint8 or tensor.dim() != 1 or len(tensor) < len(_MARK):
        return None
    data = bytes(tensor.cpu().contiguous().numpy())
    if not data.startswith(_MARK):
        return None
    described = json.loads(data[len(_MARK) :])
    identity = {name: described.pop(name) for name in ("format_version", "values")}
    scaffold = ScaffoldTensor(**{**described, "shape": tuple(described["shape"])})
    if identity != _identity(scaffold):
        raise ValueError(
            f"{scaffold.name!r} was saved as format {identity['format_version']} of family {scaffold.family!r}, which "
            "draws other values here. Use the hf_lottalora version, and the register_family call, it was saved with."
        )
    return scaffold


def _identity(scaffold: ScaffoldTensor) -> dict[str, object]:
    return {"format_version": FORMAT_VERSION, "values": get_family(scaffold.family).identity}
