"""A configuration in the form in which two of them can be compared: what `config.json` makes of it.

Some configurations derive values when they are built, and JSON has no infinity: what stands in a file is not what
stands in memory. So a file is read back into its class, and what is in memory is written and read back, to be compared.
"""

from __future__ import annotations

import hashlib
import json
import operator
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from typing import Any

from transformers import PreTrainedConfig

# Parts of configuration keys that do not change what a model computes.
_NEUTRAL = (
    "architectures", "attn_implementation", "bos_token_id", "cache", "checkpointing", "decoder_start_token_id",
    "dtype", "forced_", "id2label", "label2id", "output_attentions", "output_hidden_states", "return_dict",
    "transformers_version",
)  # fmt: skip
# Of those that change it in training only, or the sizes of tables, which are compared by themselves: a base model may
# have others, the artifact's own file may not.
_OF_FILES = ("dropout", "output_router", "problem_type", "vocab")


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
    mine, theirs = plain(one), plain(other)
    return next(_differences(mine, theirs), None)


def describe(architecture: Any) -> dict[str, Any]:
    """What the manifest of an artifact says of a configuration.

    Returns:
        values: what a file may not change, by key, parts (text, vision) as dictionaries.
        chosen: paths, lists of keys, of those that are not the class's default: a release that lacks them builds
            another model.
    """
    values = decisive(architecture.to_dict(), of_file=True)
    defaults = _defaults(architecture, of_file=True)
    chosen = [list(path) for path, _ in _leaves(values) if not _holds(defaults, path, values)]
    return {"values": values, "chosen": chosen}


def first_contradiction(described: Mapping[str, Any], architecture: Any) -> tuple[str, Any, Any] | None:
    """The first key in which a configuration is not the one that was described, None where it builds the same.

    Keys of which only the artifact's own file may not have others are passed over. What only one of the two releases of
    transformers knows must have its class's default on the other side.
    """
    recorded, live = decisive(described["values"]), plain(architecture)
    for difference in _differences(recorded, live):
        return difference
    for path in described["chosen"]:
        if _has(recorded, path) and not _has(live, path):
            return ".".join(path), _at(recorded, path), UNKNOWN
    defaults = _defaults(architecture)
    for path, value in _leaves(live):
        if not _has(recorded, path) and not _holds(defaults, path, live):
            return ".".join(path), UNKNOWN, value
    return None


def first_edit(described: Mapping[str, Any], content: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first key in which a `config.json` does not say what was described, None where it does.

    What is its class's default, need not stand in it.
    """
    recorded, said = described["values"], decisive(content, of_file=True)
    for path, value in _leaves(said):
        if not _holds(recorded, path, said):
            return ".".join(path), _at(recorded, path) if _has(recorded, path) else UNKNOWN, value
    for path in described["chosen"]:
        if not _has(said, path):
            return ".".join(path), _at(recorded, path), UNKNOWN
    return None


UNKNOWN = "nothing"  # of a key that one side does not have


def plain(architecture: Any) -> dict[str, Any]:
    """The keys of a configuration that decide what its model computes in evaluation, as JSON has them."""
    return decisive(architecture.to_dict())


def decisive(content: Mapping[str, Any], of_file: bool = False) -> dict[str, Any]:
    """Of the content of a configuration what decides in evaluation, or all that a file may not change, as JSON."""
    # Through text, so that tuples and lists, numbers and strings as keys, and NaN and NaN are the same. Numbers that
    # JSON lacks as transformers writes them into files.
    text = json.dumps(content, default=str)
    neutral = _NEUTRAL if of_file else _NEUTRAL + _OF_FILES
    return _without(neutral, json.loads(text, parse_constant=lambda name: {"__float__": name}))


def _without(neutral: Sequence[str], content: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without(neutral, value) if isinstance(value, dict) else value
        for key, value in sorted(content.items())
        if not (key.startswith("_") and key != "__float__") and not any(part in key for part in neutral)
    }


def _differences(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Also within the configurations of parts (text, vision)."""
    for key in sorted(one.keys() & other.keys()):
        mine, theirs = one[key], other[key]
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            yield from _differences(mine, theirs, f"{prefix}{key}.")
        elif mine != theirs:
            yield f"{prefix}{key}", mine, theirs


def _leaves(content: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*prefix, key))
        else:
            yield (*prefix, key), value


def _at(content: Any, path: Sequence[str]) -> Any:
    """The value at a path; raises KeyError or TypeError where there is none."""
    return reduce(operator.getitem, path, content)


def _has(content: Mapping[str, Any], path: Sequence[str]) -> bool:
    try:
        _at(content, path)
    except (KeyError, TypeError):
        return False
    return True


def _holds(defaults: Mapping[str, Any], path: Sequence[str], content: Mapping[str, Any]) -> bool:
    return _has(defaults, path) and _at(defaults, path) == _at(content, path)


def _defaults(architecture: Any, of_file: bool = False) -> dict[str, Any]:
    """What the class of a configuration, and those of its parts, have where nothing is said."""
    try:
        found = decisive(type(architecture)().to_dict(), of_file)
    except Exception:  # some have none without their parts
        found = {"model_type": architecture.model_type}
    parts = {key: part for key, part in vars(architecture).items() if isinstance(part, PreTrainedConfig)}
    return found | {key: _defaults(part, of_file) for key, part in parts.items()}


def canonical_json(content: Any) -> bytes:
    """JSON in one form: sorted keys, no spaces."""
    return json.dumps(content, separators=(",", ":"), sort_keys=True).encode()


def digest_of(content: Any) -> str:
    """SHA-256 of a content's JSON, 64 hexadecimal digits."""
    return hashlib.sha256(canonical_json(content)).hexdigest()
