"""What the fields of `LottaLoraConfig` may be."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, Literal, TypeGuard, get_args

from peft import LoraConfig

from .scaffold.draw import FORMAT_VERSION, GENERATOR
from .scaffold.families import get_family
from .scaffold.scales import SCALE_RULES

Redraw = Literal["all", "targets", "none"]
Embeddings = Literal["train", "frozen", "lora"]
TrainOrFrozen = Literal["train", "frozen"]
Head = Literal["train", "lora", "lora_bias"]
Magnitude = Literal["outputs", "inputs"]

# Options of LoraConfig that read, decompose or rewrite the base weight, or that this version does not carry over a
# scaffold. Each is refused by name unless it has its default value, and is left out of adapter_config.json.
REFUSED = {
    "alora_invocation_tokens": "activated LoRA is not supported",
    "arrow_config": "Arrow routing is not supported",
    "bias": "which biases are trained is said by biases='train' or biases='frozen'",
    "corda_config": "CorDA decomposes a pretrained weight; a scaffold is random",
    "ensure_weight_tying": "tied embeddings always stay tied here, there is nothing to ensure",
    "eva_config": "EVA initialises from activations of a pretrained network",
    "fan_in_fan_out": "the layout of a weight is read off the layer",
    "kasa_config": "KaSA truncates a pretrained weight; a scaffold is random",
    "layer_replication": "a replicated layer would have no scaffold of its own",
    "loftq_config": "LoftQ quantises a pretrained weight; a scaffold needs no storage",
    "lora_bias": "a bias on lora_B is not supported",
    "lora_ga_config": "LoRA-GA initialises from gradients of a pretrained network",
    "megatron_config": "Megatron layers are not supported",
    "monteclora_config": "MonteCLoRA is not supported",
    "target_parameters": "adapters on bare parameters are not supported",
    "trainable_token_indices": "embeddings are trained as a whole, frozen, or adapted: see the field `embeddings`",
    "use_bdlora": "BD-LoRA is not supported",
    "use_qalora": "QA-LoRA needs a quantised base",
    "velora_config": "VeLoRA is not supported",
}


def check_format(version: int | None, generator: str, from_file: bool) -> int:
    """The scaffold's format, the one drawn here where a new config names none.

    Raises:
        ValueError: it is unknown, or a file names none.
    """
    if version is None:
        if from_file:
            raise ValueError(
                "The adapter_config.json has no 'format_version', so it is unknown which scaffold its seed means. "
                "The file is damaged or not a LottaLoRA artifact."
            )
        version = FORMAT_VERSION
    if version != FORMAT_VERSION or generator != GENERATOR:
        raise ValueError(
            f"Scaffold format {version!r} with generator {generator!r} is not known to this "
            f"version of hf_lottalora, which draws format {FORMAT_VERSION} with {GENERATOR!r}. "
            "Upgrade with: pip install -U hf-lottalora"
        )
    return version


def check_choices(values: Mapping[str, Any]) -> None:
    """Fields with a fixed set of values, and the scale rule, which the family limits."""
    for name, choices in (
        ("redraw", get_args(Redraw)),
        ("embeddings", get_args(Embeddings)),
        ("head", (*get_args(Head), None)),
        ("norms", get_args(TrainOrFrozen)),
        ("dora_magnitude", get_args(Magnitude)),
        ("biases", get_args(TrainOrFrozen)),
    ):
        if values[name] not in choices:
            raise ValueError(f"{name} must be one of {list(choices)}, got {values[name]!r}.")
    for name in ("train_beta", "decay_beta", "save_kept", "layer_norm", "residual", "use_dora", "use_rslora"):
        if not isinstance(values[name], bool):
            raise ValueError(f"{name} must be True or False, got {values[name]!r}.")
    rule, gain = values["scale"], get_family(values["family"]).scale_rule == "gain"
    if not ((_is_positive(rule) and 1e-30 < rule < 1e30) or (rule in SCALE_RULES and (rule == "gain") == gain)):
        rules = [] if gain else [name for name in SCALE_RULES if name != "gain"]
        raise ValueError(
            f"scale must be None, {', '.join(map(repr, [*rules]))}{', ' if rules else ''}or a positive number for "
            f"family {values['family']!r}, got {rule!r}."
        )


def check_patterns(values: Mapping[str, Any]) -> None:
    """Fields that name modules: regular expressions that compile, with values of the right type."""
    for name, what, fits in (
        ("family_pattern", "the name of a family", lambda value: isinstance(value, str)),
        ("seed_pattern", "an integer", lambda value: isinstance(value, int) and not isinstance(value, bool)),
        ("train_beta_pattern", "True or False", lambda value: isinstance(value, bool)),
        ("rank_pattern", "a positive integer", is_rank),
        ("alpha_pattern", "a positive number", _is_positive),
    ):
        pattern = values[name]
        if not isinstance(pattern, Mapping):
            raise ValueError(f"{name} must be a dict with patterns of module names as keys, got {pattern!r}.")
        for key, value in pattern.items():
            _check_regex(name, key)
            if not fits(value):
                raise ValueError(f"{name}[{key!r}] must be {what}, got {value!r}.")
    for family in values["family_pattern"].values():
        get_family(family)
    for name in ("target_modules", "exclude_modules"):
        wanted = values[name]
        if isinstance(wanted, str):
            _check_regex(name, wanted)
        elif wanted is not None and not (
            isinstance(wanted, (list, set, tuple)) and all(isinstance(entry, str) for entry in wanted)
        ):
            raise ValueError(f"{name} must be a list of module names or a regular expression, got {wanted!r}.")


def check_numbers(values: Mapping[str, Any]) -> None:
    """Rank, alpha and dropout."""
    if not is_rank(values["r"]):
        raise ValueError(f"r must be a positive integer, got {values['r']!r}.")
    if not _is_positive(values["lora_alpha"]):
        raise ValueError(f"lora_alpha must be a positive number, got {values['lora_alpha']!r}.")
    dropout = values["lora_dropout"]
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ValueError(f"lora_dropout must be a number in [0, 1), got {dropout!r}.")


def check_refused(values: Mapping[str, Any]) -> None:
    """Options of PEFT's LoRA that make no sense here."""
    if not isinstance(values["init_lora_weights"], bool):
        raise ValueError(
            f"init_lora_weights={values['init_lora_weights']!r} makes no sense over a random scaffold: there is no "
            "pretrained weight to start from. Use True (A Kaiming uniform, B zero) or False (both Kaiming uniform)."
        )
    for option in dataclasses.fields(LoraConfig):
        if option.name in REFUSED and values[option.name] != _default(option):
            raise ValueError(f"LottaLoraConfig does not take {option.name}: {REFUSED[option.name]}.")


def _check_regex(name: str, pattern: Any) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{name}: {pattern!r} is no regular expression: {error}.") from None


def is_rank(value: Any) -> bool:
    """Whether it is a positive integer."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_positive(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _default(option: dataclasses.Field[Any]) -> Any:
    return option.default_factory() if callable(option.default_factory) else option.default
