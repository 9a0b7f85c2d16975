"""`lottalora plan`: what a model of an architecture, or of an artifact, would be; nothing is drawn for it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from peft.utils import CONFIG_NAME
from transformers import PreTrainedModel

from ..artifact.arguments import one_dtype
from ..artifact.config_json import build, check_config_json, load_architecture, most_parameters
from ..artifact.files import locate, recorded_tensors
from ..artifact.hollow import hollow
from ..artifact.reader import ArtifactError
from ..config import LottaLoraConfig
from ..experiments.cost_report import plan_costs
from ..plan.planner import make_plan
from .memory import resident_bytes
from .opened import artifact_folder, read_config
from .outcome import Outcome, WrongUsageError, table


def plan(
    path: str,
    *,
    options: Mapping[str, Any],
    more: list[str],
    model_class: str | None = None,
    dtype: str | None = None,
    tokens: int = 1,
    **where: Any,
) -> Outcome:
    """Plan a model without values.

    Args:
        path: a `config.json`, a folder or hub repository with one, or an artifact.
        options: fields of `LottaLoraConfig` that were given; of an artifact there must be none.
        more: further ones as NAME=VALUE, the value in JSON or a word.
        model_class: of transformers, an auto class or another; default: that of the `config.json`.
        dtype: of the model; default: that of the `config.json`, else float32.
        tokens: in a training step.
        where: `subfolder`, `revision`, `token`.

    Raises:
        WrongUsageError: options that cannot be meant.
        ValueError, OSError: the architecture cannot be read or built, or the plan is impossible.
    """
    given = {**{name: value for name, value in options.items() if value is not None}, **_parsed(more)}
    file, config = _opened(path, given, where)
    architecture = load_architecture(file)
    wanted = one_dtype(dtype, None) or architecture.dtype or torch.float32
    limit = None if config._artifact_manifest is None else most_parameters(recorded_tensors(config))
    with hollow(limit):
        model = build(file, lambda: _made(architecture, model_class, wanted))
    model.tie_weights()
    made = make_plan(model, config)
    costs = {name: value for name, value in vars(plan_costs(made, tokens)).items() if value is not None}
    memory = resident_bytes(model, made)
    data = {"path": path, **made.to_dict(), "memory_bytes": memory, "costs": {"tokens": tokens, **costs}}
    lines = {f"{form} scaffold": size for form, size in memory.items()}
    text = [
        str(made),
        "",
        "weights in memory, bytes",
        table(lines),
        "",
        f"training, {tokens:,} token{'s' * (tokens != 1)} a step: all weights, LottaLoRA",
        table(
            {
                "FLOPs (paper)": f"{costs['full_flops']:,.0f}, {costs['flops']:,.0f}",
                "weights, optimiser": f"{costs['full_bytes_counted']:,}, {costs['bytes_counted']:,} bytes",
                "saved": f"{costs['checkpoint_bytes']:,}, {costs['artifact_bytes']:,} bytes",
            }
        ),
    ]
    return Outcome(data, "\n".join(text))


def _parsed(more: list[str]) -> dict[str, Any]:
    found = {}
    fields = {field.name for field in dataclasses.fields(LottaLoraConfig)}
    for entry in more:
        name, equals, value = entry.partition("=")
        name = name.replace("-", "_")
        if not equals or name not in fields:
            raise WrongUsageError(f"--option {entry!r}: expected NAME=VALUE with a field of LottaLoraConfig as NAME.")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _opened(path: str, given: Mapping[str, Any], where: Mapping[str, Any]) -> tuple[str, Any]:
    """The `config.json`, checked, and the config to plan with."""
    hub = {name: where[name] for name in ("revision", "token") if where.get(name) is not None}
    if Path(path).is_file():
        return _checked(path), _config(given)
    file = locate(path, "config.json", where.get("subfolder"), **hub)
    if locate(path, CONFIG_NAME, where.get("subfolder"), **hub) is not None:
        if given:
            raise WrongUsageError(
                f"{path} is an artifact, which has its own {', '.join(given)}. Leave the options out."
            )
        config = read_config(artifact_folder(path, **where)[0])
        if config._artifact_architecture is None:
            raise ArtifactError(
                f"{path} has no config.json: it is of a plain nn.Module, which only its code can build."
            )
        return config._artifact_architecture, config
    if file is None:
        raise ArtifactError(f"{path} has no config.json, expected that of an architecture of transformers.")
    return _checked(file), _config(given)


def _checked(file: str) -> str:
    check_config_json(file, 0)
    return file


def _config(given: Mapping[str, Any]) -> LottaLoraConfig:
    try:
        return LottaLoraConfig(**{"seed": 0, **given})
    except (TypeError, ValueError) as error:
        raise WrongUsageError(str(error)) from error


def _made(architecture: Any, model_class: str | None, dtype: torch.dtype) -> PreTrainedModel:
    name = model_class or (architecture.architectures or [None])[0]
    found: Any = getattr(transformers, name or "", None)
    if hasattr(found, "from_config"):
        made: PreTrainedModel = found.from_config(architecture, dtype=dtype, trust_remote_code=False)
        return made
    if not isinstance(found, type) or not issubclass(found, PreTrainedModel):
        what = f"{name!r} is no model class of transformers {transformers.__version__}" if name else "No class is named"
        raise ArtifactError(f"{what}: pass one, such as --model-class AutoModelForCausalLM.")
    made = found._from_config(architecture, dtype=dtype)  # type: ignore[attr-defined]
    return made
