"""Arguments of transformers' `from_pretrained` in our loaders: what is the same here, and what there is instead."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

_QUANTISED = (
    "a scaffold is drawn, not stored; for less memory pass residency='packed', 'int4' or 'streamed'. A base model that "
    "is kept (redraw='none') you can load so yourself, for PeftModel.from_pretrained(base_model, path)."
)
_SPREAD = "the model goes to one device; for less memory there pass residency='packed' or 'streamed'."
_STRATEGIES = ("balanced", "balanced_low_0", "sequential", "disk")  # accelerate's, besides "auto"
_INSTEAD = {
    **dict.fromkeys(("quantization_config", "load_in_8bit", "load_in_4bit"), _QUANTISED),
    **dict.fromkeys(("max_memory", "offload_folder", "offload_state_dict", "offload_buffers", "tp_plan"), _SPREAD),
    "config": "it is the artifact's config.json, against which the weights are checked.",
    "low_cpu_mem_usage": "the model is built without values in any case; leave it out.",
    "trust_remote_code": "no code from a repository is run; build the model yourself, for "
    "PeftModel.from_pretrained(model, path).",
    "use_safetensors": "nothing else is read; leave it out.",
}


def instead_of(names: Iterable[str]) -> str:
    """What to do instead of passing these arguments; ends with a space, or is empty."""
    return "".join(f"Instead of {name}: {_INSTEAD[name]} " for name in names if name in _INSTEAD)


def one_dtype(dtype: torch.dtype | str | None, torch_dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype that is meant; None for the one that the model was saved in.

    Raises:
        ValueError: the two differ, or it is none.
    """
    if None not in (dtype, torch_dtype) and dtype != torch_dtype:
        raise ValueError(f"torch_dtype is another name of dtype, got dtype={dtype!r} and torch_dtype={torch_dtype!r}.")
    wanted = torch_dtype if dtype is None else dtype
    if wanted is None or wanted == "auto":
        return None
    found = getattr(torch, wanted, None) if isinstance(wanted, str) else wanted
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype must be a floating-point dtype of torch, its name, or 'auto', got {wanted!r}.")
    return found


def one_device(device: torch.device | str, device_map: Any) -> torch.device | str:
    """The device that is meant.

    Raises:
        ValueError: both are given, or the map names several devices or none.
    """
    if device_map is None:
        return device
    if device != "cpu":
        raise ValueError(f"Pass device or device_map, not both; got {device!r} and {device_map!r}.")
    places = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
    place = places.pop() if len(places) == 1 else None
    if place == "auto":
        return torch.accelerator.current_accelerator() or "cpu" if torch.accelerator.is_available() else "cpu"
    if isinstance(place, (str, int, torch.device)) and place not in (
        "balanced",
        "balanced_low_0",
        "sequential",
        "disk",
    ):
        return torch.device(place)
    raise ValueError(f"device_map={device_map!r} is not one device, but {_SPREAD} For example device='cuda'.")
