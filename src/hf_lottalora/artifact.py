"""The artifact folder: what must be in it before it is loaded, and what completes it when it is saved.

- adapter_config.json: the LottaLoraConfig with seed, format, family and digests;
- adapter_model.safetensors: A, B, beta; trained and kept tensors; the manifest. Never a scaffold weight;
- config.json: the architecture;
- README.md: a model card that shows how to load it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import torch
import transformers
from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from .checkpoint import MANIFEST_KEY, read_manifest
from .scaffold import first_difference

if TYPE_CHECKING:
    from .config import LottaLoraConfig
    from .plan import Plan

# Loaders of ours that the card may show, with what each builds.
_LOADERS = {
    "AutoLottaLoraModelForCausalLM": transformers.AutoModelForCausalLM,
    "AutoLottaLoraModelForSequenceClassification": transformers.AutoModelForSequenceClassification,
    "AutoLottaLoraModelForTokenClassification": transformers.AutoModelForTokenClassification,
    "AutoLottaLoraModelForQuestionAnswering": transformers.AutoModelForQuestionAnswering,
    "AutoLottaLoraModelForSeq2SeqLM": transformers.AutoModelForSeq2SeqLM,
    "AutoLottaLoraModelForImageClassification": transformers.AutoModelForImageClassification,
    "AutoLottaLoraModel": transformers.AutoModel,
}
# Parts of configuration keys that do not change what a model computes in evaluation.
_NEUTRAL = (
    "architectures", "attn_implementation", "bos_token_id", "cache", "checkpointing", "decoder_start_token_id",
    "dropout", "dtype", "forced_", "id2label", "label2id", "output_attentions", "output_hidden_states",
    "output_router", "problem_type", "return_dict", "transformers_version", "vocab",
)  # fmt: skip
HUB_OPTIONS = ("revision", "cache_dir", "token", "force_download", "local_files_only")
_CARD_BEGIN, _CARD_END = "<!-- hf_lottalora: begin -->", "<!-- hf_lottalora: end -->"


def locate(path: str | os.PathLike[str], filename: str, subfolder: str | None = None, **hub: Any) -> str | None:
    """Local path of one file of an artifact folder or hub repository, None where it has no such file."""
    folder = Path(path, subfolder) if subfolder else Path(path)
    if folder.is_dir():
        file = folder / filename
        return str(file) if file.is_file() else None
    try:
        wanted = {key: hub[key] for key in HUB_OPTIONS if key in hub}
        return str(hf_hub_download(str(path), filename, subfolder=subfolder, **wanted))
    except EntryNotFoundError:
        return None


def check_artifact_files(
    config: LottaLoraConfig, path: str | os.PathLike[str], subfolder: str | None = None, **hub: Any
) -> None:
    """Check the weights that stand beside an `adapter_config.json`, reading their header and manifest only.

    Leaves the shapes found there in the config: they are compared with the plan before a base model is touched.

    Raises:
        ValueError: no safetensors file, a pickled one instead, a truncated or foreign one, or one of another seed.
    """
    weights = locate(path, SAFETENSORS_WEIGHTS_NAME, subfolder, **hub)
    if weights is None:
        if locate(path, WEIGHTS_NAME, subfolder, **hub):
            raise ValueError(
                f"{path} has its weights in {WEIGHTS_NAME}, a pickle, which can run code when it is read. LottaLoRA "
                f"reads {SAFETENSORS_WEIGHTS_NAME} only; save the adapter again with safe_serialization=True."
            )
        raise ValueError(
            f"{path} has no {SAFETENSORS_WEIGHTS_NAME}; expected a folder made by save_pretrained. To read a "
            "config alone, use peft.PeftConfig.from_pretrained."
        )
    try:
        with safe_open(weights, framework="pt") as file:
            keys = list(file.keys())
            tensor = file.get_tensor(MANIFEST_KEY) if MANIFEST_KEY in keys else None
            config._artifact_shapes = {key: tuple(file.get_slice(key).get_shape()) for key in keys}
    except SafetensorError as error:
        raise ValueError(f"{weights} is not a readable safetensors file; it may be truncated ({error}).") from error
    content = read_manifest(tensor, weights)
    file = locate(path, "config.json", subfolder, **hub)
    config._artifact_architecture = None if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
    if content["seed"] != config.seed:
        raise ValueError(
            f"{weights} belongs to seed {content['seed']}, but the adapter_config.json beside it says {config.seed}. "
            "One of the two files was changed or comes from another artifact."
        )
    if config.scaffold_digests is not None:
        difference = first_difference(config.scaffold_digests, content["scaffold"])
        if difference:
            raise ValueError(f"{weights} and the adapter_config.json beside it disagree: {difference}.")


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


def check_not_pickled(folder: str | os.PathLike[str]) -> None:
    """Refuse to complete an artifact that PEFT has begun with pickled weights.

    Raises:
        ValueError: the folder contains such a file, of this or another model.
    """
    if Path(folder, WEIGHTS_NAME).is_file():
        raise ValueError(
            f"{folder} contains {WEIGHTS_NAME}, a pickle; LottaLoRA artifacts are safetensors only. Delete that file "
            "and save without safe_serialization=False. The config and any weights in safetensors there are untouched."
        )


def complete_artifact(plan: Plan, save_directory: str | os.PathLike[str], dtype: torch.dtype | None) -> None:
    """Write `config.json` (with the model's `dtype`) and our part of the card beside the weights that PEFT wrote."""
    folder = Path(save_directory)
    architecture = plan.survey.architecture
    if architecture is not None:
        architecture = type(architecture).from_dict(architecture.to_dict())
        architecture.architectures = [plan.survey.class_name]
        architecture.dtype = dtype
        architecture.save_pretrained(folder)
    if Path(folder, SAFETENSORS_WEIGHTS_NAME).is_file():
        _write_card(plan, folder)


def _write_card(plan: Plan, folder: Path) -> None:
    file = folder / "README.md"
    card = ModelCard.load(file) if file.exists() else ModelCard("---\n{}\n---\n")
    data: Any = card.data
    before, begin, rest = card.text.partition(_CARD_BEGIN)
    if begin:
        after = rest.partition(_CARD_END)[2]
    else:  # the first time: beside a user's words, but in place of PEFT's empty template
        before, after = ("" if "[More Information Needed]" in before else before.rstrip() + "\n\n"), ""
    card.text = f"{before.lstrip()}{_card_text(plan)}{after}"
    tags = {*(data.tags or []), "lottalora"}
    data.tags = sorted(tag for tag in tags if plan.survey.pretrained_from or not tag.startswith("base_model:"))
    data.library_name = "peft"
    if not plan.survey.pretrained_from:
        data.base_model = None
    card.save(file)


def builds(auto: Any, architecture: Any, class_name: str) -> bool:
    """Whether this auto class of transformers makes a `class_name` of the architecture."""
    if type(architecture) not in auto._model_mapping:
        return False
    built = auto._model_mapping[type(architecture)]
    return any(c.__name__ == class_name for c in (built if isinstance(built, tuple) else (built,)))


def loader_of(architecture: Any, class_name: str) -> str | None:
    """Name of the class of ours that builds a `class_name`, None where there is none."""
    return next((ours for ours, auto in _LOADERS.items() if builds(auto, architecture, class_name)), None)


def _card_text(plan: Plan) -> str:
    class_name, architecture = plan.survey.class_name, plan.survey.architecture
    unsaved = sum(tensor.survey.numel for tensor in plan.with_role("kept") if not tensor.saved)
    base_name = plan.survey.pretrained_from
    loader = None if unsaved and base_name in (None, "memory") else loader_of(architecture, class_name)
    if loader is not None:
        load = f'from hf_lottalora import {loader}\n\nmodel = {loader}.from_pretrained("path/to/this/folder")'
    else:
        base = "build_the_module()"
        if architecture is not None:
            base = f'{class_name}(AutoConfig.from_pretrained("path/to/this/folder"))'
        names = "" if architecture is None else f"\nfrom transformers import AutoConfig, {class_name}"
        load = (
            f"import hf_lottalora  # registers the PEFT method; must come first\nfrom peft import PeftModel{names}\n\n"
            f'model = PeftModel.from_pretrained({base}, "path/to/this/folder")'
        )
    drawn = sum(spec.numel for spec in plan.scaffold.values())
    parts = []
    if drawn:
        parts.append(
            f"{drawn:,} backbone weights are not in this repository: they are drawn from seed {plan.seed} when the "
            "model is loaded, the same to the bit everywhere."
        )
    if unsaved:
        base = "the base model it was trained over" if base_name in (None, "memory") else f"`{base_name}`"
        parts.append(f"{unsaved:,} frozen pretrained weights are not in it either: they come from {base}.")
    else:
        parts.append("Nothing else is needed to rebuild it.")
    return f"""{_CARD_BEGIN}
# {class_name} over a {"random scaffold" if drawn else "frozen backbone"}

A [LottaLoRA](https://arxiv.org/abs/2604.08749) adapter. {" ".join(parts)}

```python
{load}
```

| | |
|---|---|
| seed | {plan.seed} |
| drawn, frozen parameters | {drawn:,} |
| trained parameters | {plan.trainable_parameters:,} |
| of which A, B and beta | {plan.adapter_parameters:,} |

Needs `pip install hf-lottalora`.

### Framework versions

- PEFT {peft.__version__}
{_CARD_END}
"""
