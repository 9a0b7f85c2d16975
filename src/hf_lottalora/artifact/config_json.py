"""The `config.json` of an artifact: nothing that it says makes the building of a model run code, fetch or never end.

What it says is not compared with the model here. Not covered: sizes that are consistent with the weights beside them,
and widths below the limit, which ask torch for memory that is not there; it says so, and nothing has been drawn.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, AutoConfig

from .reader import ArtifactError, read_json

_MAX = 2**26  # any integer: vocabularies, positions, widths; the largest default of transformers has 21 bits
_MAX_LABELS = 10**6  # transformers makes a dictionary with so many entries
_MAX_LAYERS = 1000  # or as many as the artifact has tensors
_LAYERS = re.compile(r"(^|_)(layers?|depths?)$")
_FREE = re.compile(r"theta|base|seed|token_id")  # integers that say nothing about sizes
_ATTENTION = re.compile(r"_*(attn|experts)_implementation(_internal)?")


def most_parameters(tensors: int) -> int:
    """How many parameters a model may have that is built for an artifact with so many recorded tensors.

    Frozen biases and norms are not recorded, and what is tied is built several times.
    """
    return 1000 + 20 * tensors


def check_config_json(file: str | os.PathLike[str], tensors: int) -> None:
    """Whether a configuration can be made of the file, and a model built of that, on this machine and in its time.

    Args:
        file: path of the `config.json`.
        tensors: how many tensors the artifact records: drawn, kept and saved ones.

    Raises:
        ArtifactError: it is no JSON object, or a value would run, fetch or allocate without end.
    """
    for where, key, value in _walk(read_json(file)):
        if isinstance(value, (int, float)) and "dropout" in key and not 0 <= value <= 1:
            raise ArtifactError(
                f"{file}: {where}: expected a probability from 0 to 1, found {value}. Get the file again from where it "
                "came."
            )
        if isinstance(value, int) and not isinstance(value, bool) and not _FREE.search(key):
            most = max(_MAX_LAYERS, tensors) if _LAYERS.search(key) else _MAX_LABELS if key == "num_labels" else _MAX
            if abs(value) > most:
                raise ArtifactError(
                    f"{file}: {where}: expected at most {most} in an artifact of {tensors} tensors, found {value}. Get "
                    "the file again from where it came."
                )
        elif isinstance(value, str) and _ATTENTION.fullmatch(key):
            raise ArtifactError(
                f"{file}: {where}: expected none, since transformers does not write it, found {value!r}, which rounds "
                "otherwise or may be code from the hub. Take it out of the file, and pass it to the loader if you want "
                "it."
            )
        elif isinstance(value, str) and value.startswith(("hf-hub:", "hf_hub:")):
            raise ArtifactError(
                f"{file}: {where}: expected the name of an architecture, found {value!r}, which would be fetched from "
                "the hub. Build the model yourself and use PeftModel.from_pretrained(model, path)."
            )
        elif isinstance(value, dict) and _is_fetched(value):
            raise ArtifactError(
                f"{file}: {where or 'backbone'}: expected a backbone_config beside backbone={value['backbone']!r}, "
                "found none, so it would be fetched from the hub. Save the artifact again with a newer transformers."
            )


def _is_fetched(part: dict[str, Any]) -> bool:
    """Whether transformers asks the hub for this configuration of a backbone."""
    return bool(part.get("backbone")) and not part.get("use_timm_backbone", True) and not part.get("backbone_config")


def _walk(value: Any, where: str = "", key: str = "") -> Iterator[tuple[str, str, Any]]:
    """Path, key and value of everything in a JSON object; an element of a list has the list's key."""
    yield where, key, value
    if isinstance(value, dict):
        for name, inner in value.items():
            # Of attn_implementation={"text_config": "sdpa"} each part is one.
            yield from _walk(inner, f"{where}.{name}" if where else name, key if _ATTENTION.fullmatch(key) else name)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _walk(item, f"{where}[{number}]", key)


def load_architecture(file: str | os.PathLike[str]) -> Any:
    """The transformers configuration in a checked `config.json`.

    Raises:
        ArtifactError: this version of transformers does not know it, or cannot make it of these values.
    """
    content = read_json(file)
    model_type, classes = content.get("model_type"), content.get("architectures")
    if not (classes is None or (isinstance(classes, list) and all(isinstance(name, str) for name in classes))):
        raise ArtifactError(f"{file}: architectures: expected a list of one class name, found {classes!r:.80}.")
    if model_type is not None and not (isinstance(model_type, str) and model_type in CONFIG_MAPPING):
        raise ArtifactError(
            f"{file}: model_type: expected one that transformers {transformers.__version__} knows, found "
            f"{model_type!r}. No code from a repository is run: upgrade transformers, or build the model yourself and "
            "use PeftModel.from_pretrained(model, path)."
        )
    return _of_file(file, lambda: AutoConfig.from_pretrained(file, trust_remote_code=False))


def build(file: str | os.PathLike[str], make: Callable[[], Any]) -> Any:
    """The model that this makes of the configuration in the file.

    Raises:
        ArtifactError: its values make no model.
        ImportError: as transformers raises it, for a package that is not installed.
    """
    return _of_file(file, make)


def _of_file(file: str | os.PathLike[str], make: Callable[[], Any]) -> Any:
    try:
        return make()
    except (ArtifactError, ImportError):
        raise
    except Exception as error:  # whatever a value of the file leads to
        raise ArtifactError(
            f"{file}: expected what transformers {transformers.__version__} can build, found "
            f"{type(error).__name__}: {error}. Get the file again from where it came, or build the model yourself and "
            "use PeftModel.from_pretrained(model, path)."
        ) from error
