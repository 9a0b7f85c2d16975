"""A configuration in the form in which two of them can be compared: what `config.json` makes of it.

Some configurations derive values when they are built, and JSON has no infinity: what stands in a file is not what
stands in memory. So a file is read back into its class, and what is in memory is written and read back, to be compared.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from typing import Any

# Parts of configuration keys that do not change what a model computes in evaluation.
_NEUTRAL = (
    "architectures", "attn_implementation", "bos_token_id", "cache", "checkpointing", "decoder_start_token_id",
    "dropout", "dtype", "forced_", "id2label", "label2id", "output_attentions", "output_hidden_states",
    "output_router", "problem_type", "return_dict", "transformers_version", "vocab",
)  # fmt: skip


def read_back(architecture: Any) -> Any:
    """A transformers configuration as its own `config.json` gives it back."""
    with tempfile.TemporaryDirectory() as folder:
        # A copy: saving one fills in its version. Its class and not AutoConfig, which may not know it.
        type(architecture).from_dict(architecture.to_dict()).save_pretrained(folder)
        return type(architecture).from_pretrained(folder)


def first_change(one: Any, other: Any) -> tuple[str, Any, Any] | None:
    """The first key that both configurations have with other values: its path and the two values.

    Keys that do not change what a model computes in evaluation are passed over.
    """
    return _difference(_plain(one), _plain(other))


def _plain(architecture: Any) -> dict[str, Any]:
    # Through text, so that tuples and lists, numbers and strings as keys, and NaN and NaN are the same.
    content: dict[str, Any] = json.loads(json.dumps(architecture.to_dict(), default=str), parse_constant=str)
    return content


def _difference(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> tuple[str, Any, Any] | None:
    """Also within the configurations of parts (text, vision)."""
    for key in sorted(one.keys() & other.keys()):
        if key.startswith("_") or any(part in key for part in _NEUTRAL):
            continue
        mine, theirs = one[key], other[key]
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            found = _difference(mine, theirs, f"{prefix}{key}.")
            if found:
                return found
        elif mine != theirs:
            return f"{prefix}{key}", mine, theirs
    return None
