"""What an adapter file contains, and the checks that every way of loading one passes through.

`PeftModel.load_adapter` on an existing adapter (Trainer's resume and load-best) never reads adapter_config.json, so
seed, format and digests also travel inside the file, as a small uint8 tensor of JSON: the manifest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from ..plan.plan import MANIFEST_KEY, Plan
from ..scaffold.draw import FORMAT_VERSION, GENERATOR
from ..scaffold.tensor import combined_digest, first_difference


def read_manifest(tensor: torch.Tensor | None, where: str) -> dict[str, Any]:
    """The content of a manifest tensor.

    Raises:
        ValueError: there is none or it is damaged, or its format is unknown.
    """
    if tensor is None:
        raise ValueError(
            f"{where} has no {MANIFEST_KEY!r}, so its seed is unknown. Expected the adapter file of a LottaLoRA "
            "artifact; a plain LoRA adapter does not fit a random backbone."
        )
    try:
        content = json.loads(bytes(tensor.cpu().contiguous().numpy()))
        version, generator, _ = content["format_version"], content["generator"], content["seed"]
        digest = combined_digest(content["seed"], content["scaffold"])
        content["kept"], content["scaling"], content["residual"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where} has a damaged {MANIFEST_KEY!r} ({error}).") from error
    if version != FORMAT_VERSION or generator != GENERATOR:
        raise ValueError(
            f"{where} has scaffold format {version!r} with generator {generator!r}; this version of hf_lottalora draws "
            f"format {FORMAT_VERSION} with {GENERATOR!r}. Upgrade with: pip install -U hf-lottalora"
        )
    if digest != content.get("digest"):
        raise ValueError(f"{where} has a {MANIFEST_KEY!r} that was edited: its digests do not add up.")
    return dict(content)


def check_scaffold(plan: Plan, seed: int, scaffold: Mapping[str, str], kept: Mapping[str, str], where: str) -> None:
    """Compare recorded seed and digests with what this model would draw.

    Raises:
        ValueError: they differ; the message names the first differing tensor.
    """
    if seed != plan.seed:
        raise ValueError(
            f"{where} belongs to seed {seed}, this model's scaffold is drawn from seed {plan.seed}. Nothing was "
            f"loaded. Build the model with LottaLoraConfig(seed={seed}, ...)."
        )
    difference = first_difference(scaffold, plan.scaffold_digests()) or first_difference(kept, plan.kept_digests)
    if difference:
        raise ValueError(
            f"{where} was made over another backbone: {difference}. Nothing was loaded. Check the architecture "
            "(config.json), the options of LottaLoraConfig, the base model, and that no module was renamed."
        )


def check_state_dict(plan: Plan, state_dict: Mapping[str, torch.Tensor], where: str = "The adapter file") -> None:
    """Refuse a state dict that is not exactly what this plan saves. Changes nothing.

    Raises:
        ValueError: no manifest, another seed, format or scaffold, a missing or foreign key, or a shape or a scaling
            factor that differs; the message names the first one.
    """
    content = read_manifest(state_dict.get(MANIFEST_KEY), where)
    check_content(plan, content, {key: tuple(value.shape) for key, value in state_dict.items()}, where)


def check_content(
    plan: Plan, content: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str = "The adapter file"
) -> None:
    """Refuse an adapter file by its manifest and the shapes in its header, before its tensors are read.

    Raises:
        ValueError: as `check_state_dict`.
    """
    check_scaffold(plan, content["seed"], content["scaffold"], content["kept"], where)
    check_shapes(plan, shapes, where, "Nothing was loaded.")
    if content["residual"] != any(adapter.residual for adapter in plan.adapters):
        raise ValueError(
            f"{where} was trained with residual={content['residual']}, this model has {not content['residual']}. "
            "Nothing was loaded. Use the same option in LottaLoraConfig."
        )
    rows = content.get("rows", {})
    if rows != plan.trained_rows():
        raise ValueError(
            f"{where} has trained rows {rows}, this model trains {plan.trained_rows()}. Nothing was loaded. Use "
            "the same trainable_token_indices in LottaLoraConfig."
        )
    for adapter in plan.adapters:  # the same ones: their keys were just compared
        trained_with = content["scaling"].get(adapter.path)
        if trained_with != adapter.scaling:
            raise ValueError(
                f"{where} was trained with B A of {adapter.path!r} scaled by {trained_with} (alpha / r), this model "
                f"scales it by {adapter.scaling}. Nothing was loaded. Check lora_alpha, alpha_pattern and use_rslora."
            )


def check_shapes(plan: Plan, found: Mapping[str, tuple[int, ...]], where: str, advice: str) -> None:
    """Compare the keys and shapes of an adapter file with the plan's; the manifest's shape is free.

    Args:
        plan: what is expected.
        found: shapes by key.
        where: what was looked at, the subject of the error's sentence.
        advice: how the error ends.

    Raises:
        ValueError: the first key that is missing, foreign or of another shape.
    """
    expected = plan.saved_shapes()
    for key in sorted(expected.keys() | found.keys() - {MANIFEST_KEY}):
        if key not in found:
            raise ValueError(f"{where} lacks {key!r}, expected with shape {expected[key]}. {advice}")
        if key not in expected:
            raise ValueError(f"{where} has the foreign key {key!r}, which this model does not save. {advice}")
        if tuple(found[key]) != expected[key]:
            raise ValueError(f"{where} has {key!r} with shape {tuple(found[key])}, expected {expected[key]}. {advice}")
