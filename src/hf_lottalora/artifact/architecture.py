"""Whether a base model has the architecture that an artifact was made over."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# Parts of configuration keys that do not change what a model computes in evaluation.
_NEUTRAL = (
    "architectures", "attn_implementation", "bos_token_id", "cache", "checkpointing", "decoder_start_token_id",
    "dropout", "dtype", "forced_", "id2label", "label2id", "output_attentions", "output_hidden_states",
    "output_router", "problem_type", "return_dict", "transformers_version", "vocab",
)  # fmt: skip


def check_architecture(saved: Mapping[str, Any] | None, architecture: Any) -> None:
    """Compare the artifact's `config.json` with the base model's configuration, where both know a key.

    Two models of the same shapes can still compute other things: heads, activation, rotary base, epsilons.

    Raises:
        ValueError: a key that changes what the model computes differs; the message names it.
    """
    if saved is None or architecture is None:
        return
    difference = _difference(saved, json.loads(json.dumps(architecture.to_dict(), default=str)))
    if difference:
        key, theirs, ours = difference
        raise ValueError(
            f"The artifact was made over another architecture: its config.json says {key}={theirs!r}, this model has "
            f"{ours!r}. Nothing was loaded. Build the base model from that config.json."
        )


def _difference(saved: Mapping[str, Any], live: Mapping[str, Any], prefix: str = "") -> tuple[str, Any, Any] | None:
    """The first key that both have with other values, also within the configurations of parts (text, vision)."""
    for key in sorted(saved.keys() & live.keys()):
        if key.startswith("_") or any(part in key for part in _NEUTRAL):
            continue
        theirs, ours = saved[key], live[key]
        if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
            found = _difference(theirs, ours, f"{prefix}{key}.")
            if found:
                return found
        elif theirs != ours:
            return f"{prefix}{key}", theirs, ours
    return None
