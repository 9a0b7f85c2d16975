"""A safetensors file that is written a tensor at a time; safetensors itself wants all of them at once."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..plan.storage import SAFETENSORS_NAMES

_COPIED = 1 << 24  # bytes that are copied at once on their way from an accelerator or out of a view


class TensorFile:
    """A safetensors file whose tensors are written one by one, in any order."""

    def __init__(self, path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write the header, and make the file as long as it will be.

        Args:
            path: of the file.
            tensors: what it will contain, on the meta device.
        """
        self.path, self._at, at = path, dict[str, int](), 0
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        # The order of safetensors, by which each tensor is aligned.
        for name in sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)):
            tensor = tensors[name]
            self._at[name], end = at, at + math.prod(tensor.shape) * tensor.dtype.itemsize
            entry = {"dtype": SAFETENSORS_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
            header[name], at = entry, end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(self._start + at)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write the values of one tensor, on any device."""
        with self.path.open("r+b") as file:
            file.seek(self._start + self._at[name])
            rows = tensor.detach().reshape(1) if tensor.dim() == 0 else tensor.detach()
            step = max(1, _COPIED * len(rows) // max(1, rows.nbytes))
            for first in range(0, len(rows), step):
                piece = rows[first : first + step].cpu().contiguous()
                file.write(memoryview(piece.view(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
