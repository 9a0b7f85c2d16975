"""What an adapter file contains, and the checks that every way of loading one passes through.

`PeftModel.load_adapter` on an existing adapter (Trainer's resume and load-best) never reads adapter_config.json, so
everything that makes the model also travels inside the file, as a small uint8 tensor of JSON: the manifest. It holds
the seed and digests of what is drawn, digests of what is saved, how the file holds it where that is not as it is, the
options, the architecture, and one digest over all of it, which names the artifact. Those of version 0.1 held the seed
and the digests of what is drawn.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from ..config import LottaLoraConfig
from ..plan.canonical import digest_of
from ..plan.plan import MANIFEST_KEY, Plan
from ..scaffold.draw import FORMAT_VERSION, GENERATOR
from ..scaffold.tensor import combined_digest, first_difference
from .architecture import check_architecture
from .digests import differing, digests_one_by_one, number_of, summed_up, tensor_digests
from .reader import ArtifactError, parse
from .stored import encoded, file_shapes

_FIELDS_OF_0_1 = {"format_version", "generator", "seed", "digest", "scaffold", "kept", "scaling", "residual", "rows"}
_FIELDS = _FIELDS_OF_0_1 | {
    "trained", "class", "architecture", "options", "tensors", "kept_bytes", "stored", "artifact",
}  # fmt: skip

_for_a_file = ContextVar("for_a_file", default=False)


@contextmanager
def for_a_file() -> Iterator[None]:
    """While an artifact is written, its tensors are made small, and its manifest says what they are.

    Those in memory are whole, and may be averaged, say.
    """
    token = _for_a_file.set(True)
    try:
        yield
    finally:
        _for_a_file.reset(token)


def with_manifest(
    plan: Plan,
    config: LottaLoraConfig,
    tensors: Mapping[str, torch.Tensor],
    kept: Callable[[], Iterable[tuple[str, torch.Tensor]]],
) -> dict[str, torch.Tensor]:
    """The tensors that a plan saves, by key, and their manifest: as they are, or while one is written as in a file.

    Args:
        plan: of the adapter.
        config: of the adapter.
        tensors: what is saved.
        kept: gives what is neither drawn nor saved, by canonical name; asked once, for the first file.

    Raises:
        ValueError: a value does not fit the config's `save_dtype`.
    """
    options = config.as_saved().decisive_options()
    if not _for_a_file.get():
        return {MANIFEST_KEY: plan.manifest(options, config._saved_dtype, None), **tensors}
    record_kept(plan, kept)
    found, stored = encoded(plan, tensors, config.save_dtype, config._stored)
    digests = summed_up(tensor_digests(found, found.__getitem__))
    return {MANIFEST_KEY: plan.manifest(options, config._saved_dtype, digests, stored), **found}


def record_kept(plan: Plan, kept: Callable[[], Iterable[tuple[str, torch.Tensor]]]) -> None:
    """Have the digest of every byte that is kept in the plan: from now on these tensors need not be whole to be saved.

    Args:
        plan: of the adapter.
        kept: as in `with_manifest`.
    """
    if plan.kept_digests and not plan.kept_bytes:
        plan.kept_bytes.update(summed_up(digests_one_by_one(kept())))


def read_manifest(tensor: torch.Tensor | None, where: str) -> dict[str, Any]:
    """The content of a manifest tensor.

    Raises:
        ValueError: there is none or it is damaged or was edited, or its format is unknown.
    """
    if tensor is None:
        raise ValueError(
            f"{where} has no {MANIFEST_KEY!r}, so its seed is unknown. Expected the adapter file of a LottaLoRA "
            "artifact; a plain LoRA adapter does not fit a random backbone."
        )
    try:
        content = parse(tensor.cpu().contiguous().numpy().tobytes(), f"{where} has a damaged {MANIFEST_KEY!r}")
        version, generator, _ = content["format_version"], content["generator"], content["seed"]
        digest = combined_digest(content["seed"], content["scaffold"])
        content["kept"], content["scaling"], content["residual"]
    except ArtifactError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where} has a damaged {MANIFEST_KEY!r} ({error}).") from error
    if version != FORMAT_VERSION or generator != GENERATOR:
        raise ValueError(
            f"{where} has scaffold format {version!r} with generator {generator!r}; this version of hf_lottalora draws "
            f"format {FORMAT_VERSION} with {GENERATOR!r}. Upgrade with: pip install -U hf-lottalora"
        )
    by_0_1 = content.keys() <= _FIELDS_OF_0_1
    rest = {key: value for key, value in content.items() if key != "artifact"}
    if digest != content.get("digest") or not (by_0_1 or content.get("artifact") == digest_of(rest)):
        raise ValueError(f"{where} has a {MANIFEST_KEY!r} that was edited: its digests do not add up.")
    if unknown := sorted(content.keys() - _FIELDS):
        raise ValueError(
            f"{where} has a {MANIFEST_KEY!r} with {unknown}, which this version of hf_lottalora does not know. Upgrade "
            "with: pip install -U hf-lottalora"
        )
    return dict(content)


def check_options(content: Mapping[str, Any], config: LottaLoraConfig, where: str) -> None:
    """Compare an adapter_config.json that was read with the manifest of the weights beside it.

    Raises:
        ValueError: an option differs; the message names it.
    """
    if content["seed"] != config.seed:
        raise ValueError(
            f"{where} belongs to seed {content['seed']}, but the adapter_config.json beside it says {config.seed}. "
            "One of the two files was changed or comes from another artifact."
        )
    for recorded, digests in (("scaffold", config.scaffold_digests), ("kept", config.kept_digests)):
        if digests is not None and (difference := first_difference(digests, content[recorded])):
            raise ValueError(f"{where} and the adapter_config.json beside it disagree: {difference}.")
    if "options" not in content:
        if not (config.lottalora_version or "").startswith("0.1."):
            raise ValueError(
                f"{where} has the manifest of a file of version 0.1, but the adapter_config.json beside it says "
                f"lottalora_version={config.lottalora_version!r}. One of the two files was changed or comes from "
                "another artifact."
            )
        return
    found = config.decisive_options()
    for key, expected in content["options"].items():
        if key not in found and expected:  # of a newer PEFT: nothing, false and empty are what it does without
            raise ValueError(
                f"{where} was saved with the option {key}={expected!r}, which this version of hf_lottalora or PEFT "
                "does not know. Upgrade with: pip install -U hf-lottalora peft"
            )
        if key in found and found[key] != expected:
            raise ValueError(
                f"adapter_config.json: {key}: expected {expected!r}, as {where} says, found {found[key]!r}. It was "
                "changed, or comes from another artifact. To train with another value, make a new LottaLoraConfig."
            )
    if added := sorted(key for key in found.keys() - content["options"].keys() if found[key]):
        raise ValueError(
            f"adapter_config.json: {added[0]}: found {found[added[0]]!r}, where {where} was saved without that option."
        )


def check_tensors(
    content: Mapping[str, Any], keys: Iterable[str], tensor_of: Callable[[str], torch.Tensor], where: str
) -> None:
    """Compare every byte of the tensors with what the manifest says of them.

    Raises:
        ValueError: one differs; the message names the first.
    """
    if (recorded := content.get("tensors")) is None:
        return
    found = tensor_digests((key for key in keys if key != MANIFEST_KEY), tensor_of)
    advice = (
        "Nothing was loaded. Copy or download the file again. To load values that you changed, change those of "
        "get_peft_model_state_dict(model), whose manifest says nothing of them."
    )
    if len(found) != (saved := number_of(recorded)):
        raise ArtifactError(f"{where}: expected the {saved} tensors that were saved, found {len(found)}. {advice}")
    if (key := differing(recorded, found)) is not None:
        raise ArtifactError(
            f"{where}: {key!r} is not the tensor that was saved: its bytes, dtype, shape or name differ. {advice}"
        )


def check_kept(content: Mapping[str, Any], kept: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Compare every byte of what an artifact neither draws nor contains with what it was made over.

    Raises:
        ValueError: a tensor differs; the message names the first.
    """
    recorded = content.get("kept_bytes")
    if recorded is not None and (name := differing(recorded, digests_one_by_one(kept))) is not None:
        raise ValueError(
            f"{name!r} is not, to the byte, what the artifact was made over. Expected the same base model in the dtype "
            "that it had when the artifact was saved; load that one."
        )


def warn_of_0_1(content: Mapping[str, Any], where: str) -> None:
    """Say once what an artifact of version 0.1 cannot prove."""
    if "artifact" not in content:
        warnings.warn(
            f"{where} was written by version 0.1: only the scaffold is sure to be what it was. That nobody changed "
            "trained tensors, options or config.json cannot be told. Load it and save it again to record them.",
            UserWarning,
            stacklevel=2,
        )


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


def check_state_dict(
    plan: Plan, state_dict: Mapping[str, torch.Tensor], model: nn.Module, verified: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Refuse a state dict that is not exactly what this plan saves. Changes nothing.

    Args:
        plan: what is expected.
        state_dict: of an adapter, from a file or from memory.
        model: the base model.
        verified: the manifest of the file that it comes from, where its tensors have been compared with that.

    Returns:
        The content of its manifest.

    Raises:
        ValueError: no manifest, another seed, format, scaffold or architecture, a missing or foreign key, a tensor
            that is not the one that was saved, or a shape or a scaling factor that differs; the message names it.
    """
    where = "The adapter file"
    content = read_manifest(state_dict.get(MANIFEST_KEY), where)
    check_content(plan, content, {key: tuple(value.shape) for key, value in state_dict.items()}, where)
    if verified != content:
        check_architecture(content, None, model)
        warn_of_0_1(content, where)
        check_tensors(content, state_dict, state_dict.__getitem__, where)
    return content


def check_content(
    plan: Plan, content: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str = "The adapter file"
) -> None:
    """Refuse an adapter file by its manifest and the shapes in its header, before its tensors are read.

    Raises:
        ValueError: as `check_state_dict`.
    """
    theirs, mine = (options.get("adapter", "lora") for options in (content.get("options", {}), plan.options))
    if theirs != mine:
        raise ValueError(
            f"{where} has an adapter of kind {theirs!r}, this model has adapter={mine!r}. Nothing was loaded. Build "
            f"the model with LottaLoraConfig(adapter={theirs!r}, ...)."
        )
    check_scaffold(plan, content["seed"], content["scaffold"], content["kept"], where)
    check_shapes(file_shapes(plan, content.get("stored"), where), shapes, where, "Nothing was loaded.")
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
    trained, ours = set(content.get("trained", plan.trained_paths())), set(plan.trained_paths())
    if trained != ours:
        raise ValueError(
            f"{where} trains {_some(trained - ours)} and leaves {_some(ours - trained)}, which this model does the "
            "other way round. Nothing was loaded. Use the same train_beta, norms, biases, embeddings and head in "
            "LottaLoraConfig."
        )
    for adapter in plan.adapters:  # the same ones: their keys were just compared
        trained_with = content["scaling"].get(adapter.path)
        if trained_with != adapter.scaling:
            raise ValueError(
                f"{where} was trained with B A of {adapter.path!r} scaled by {trained_with} (alpha / r), this model "
                f"scales it by {adapter.scaling}. Nothing was loaded. Check lora_alpha, alpha_pattern and use_rslora."
            )


def _some(names: set[str]) -> str:
    shown = sorted(names)[:3]
    return (", ".join(map(repr, shown)) or "nothing") + (" ..." if len(names) > 3 else "")


def check_shapes(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], where: str, advice: str
) -> None:
    """Compare the keys and shapes of an adapter file with those that it should have; the manifest's shape is free.

    Args:
        expected: shapes by key.
        found: the same.
        where: what was looked at, the subject of the error's sentence.
        advice: how the error ends.

    Raises:
        ValueError: the first key that is missing, foreign or of another shape.
    """
    for key in sorted(expected.keys() | found.keys() - {MANIFEST_KEY}):
        if key not in found:
            raise ValueError(f"{where} lacks {key!r}, expected with shape {expected[key]}. {advice}")
        if key not in expected:
            raise ValueError(f"{where} has the foreign key {key!r}, which this model does not save. {advice}")
        if tuple(found[key]) != expected[key]:
            raise ValueError(f"{where} has {key!r} with shape {tuple(found[key])}, expected {expected[key]}. {advice}")
