"""What the fields of `LottaLoraConfig` may be."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import torch
from peft import LoraConfig
from peft.utils import TaskType

from .scaffold.draw import FORMAT_VERSION, GENERATOR
from .scaffold.families import get_family
from .scaffold.scales import SCALE_RULES

Redraw = Literal["all", "targets", "none"]
Embeddings = Literal["train", "frozen", "lora"]
TrainOrFrozen = Literal["train", "frozen"]
Head = Literal["train", "lora", "lora_bias"]
Magnitude = Literal["outputs", "inputs"]
SaveDtype = Literal["float16", "bfloat16", "int8"]
AdapterSource = Literal["lora", "randlora", "nola"]
BasesShared = Literal["shape", "layer"]

# Options of LoraConfig that read, decompose or rewrite the base weight, or that this version does not carry over a
# scaffold. Each is refused by name unless it has its default value, and is left out of adapter_config.json.
REFUSED = {
    "alora_invocation_tokens": "activated LoRA is not supported",
    "arrow_config": "Arrow routing is not supported",
    "corda_config": "CorDA decomposes a pretrained weight; a scaffold is random",
    "ensure_weight_tying": "tied embeddings always stay tied here, there is nothing to ensure",
    "eva_config": "EVA initialises from activations of a pretrained network",
    "fan_in_fan_out": "the layout of a weight is read off the layer",
    "kasa_config": "KaSA truncates a pretrained weight; a scaffold is random",
    "layer_replication": "a replicated layer would have no scaffold of its own",
    "loftq_config": "LoftQ quantises a pretrained weight; a scaffold needs no storage",
    "lora_ga_config": "LoRA-GA initialises from gradients of a pretrained network",
    "megatron_config": "Megatron layers are not supported",
    "monteclora_config": "MonteCLoRA is not supported",
    "target_parameters": "adapters on bare parameters are not supported",
    "use_bdlora": "BD-LoRA is not supported",
    "use_qalora": "QA-LoRA needs a quantised base",
    "velora_config": "VeLoRA is not supported",
}


class Only(NamedTuple):
    """A condition on the values of a type, in words and as a function."""

    says: str
    holds: Callable[[Any], bool]


def _is_dtype(name: str) -> bool:
    dtype = getattr(torch, name, None)
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point


_RANK = Annotated[int, Only("a positive integer", lambda value: value > 0)]
_POSITIVE = Annotated[float, Only("a positive number", lambda value: 0 < value <= sys.float_info.max)]
_FAMILY = Annotated[str, Only("the name of a family", bool)]
_MODULES = list[Annotated[str, Only("a module name", bool)]] | Annotated[str, Only("a regular expression", bool)] | None

# Where the annotation of a field says less, or (PEFT's) something else, than what is taken here.
TAKES: dict[str, Any] = {
    "task_type": Annotated[str, Only(f"one of {[t.value for t in TaskType]}", lambda value: value in list(TaskType))]
    | None,
    "peft_type": Literal["LOTTALORA"] | None,
    "auto_mapping": dict[str, str | float | bool | None] | None,
    "family": _FAMILY,
    "family_pattern": dict[str, _FAMILY],
    "r": _RANK,
    "target_modules": _MODULES,
    "exclude_modules": _MODULES,
    "rank_pattern": dict[str, _RANK],
    "lora_alpha": _POSITIVE,
    "bases": Annotated[int, Only("a positive integer up to 2**20", lambda value: 0 < value <= 1 << 20)] | None,
    "basis_family": _FAMILY | None,
    "alpha_pattern": dict[str, _POSITIVE],
    "lora_dropout": Annotated[float, Only("a number in [0, 1)", lambda value: 0 <= value < 1)],
    "other_dtypes": dict[str, Annotated[str, Only("the name of a floating dtype of torch", _is_dtype)]] | None,
}
# Each of these has a check of its own, with more to say.
TAKES |= dict.fromkeys(("seed", "adapter_seed", "init_lora_weights", "trainable_token_indices", *REFUSED), Any)


def check_types(values: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """Every field against its annotation, or what `TAKES` says instead: containers and dataclasses element by element.

    A list may be a set or tuple, a float an int; True and False are no numbers.

    Raises:
        ValueError: the first value that does not fit, by name: what was expected, and what was found.
    """
    for name, value in values.items():
        misfit = _misfit(name, value, TAKES.get(name, hints[name]))
        if misfit:
            where, found, expected = misfit
            kind = "" if found is None else f" ({type(found).__name__})"
            raise ValueError(f"{where} must be {expected}, got {found!r}{kind}.")


class _Misfit(NamedTuple):
    where: str
    found: Any
    expected: str


def _misfit(name: str, value: Any, hint: Any) -> _Misfit | None:
    """The innermost part of a value that its annotation does not allow."""
    origin, args = get_origin(hint), get_args(hint)
    parts: list[tuple[str, Any, Any]] = []
    if origin is Annotated:
        base, only = args
        within = _misfit(name, value, base)
        if within is not None and within.where != name:
            return within
        fits = within is None and only.holds(value)
    elif origin in (Union, UnionType):
        within_each = [_misfit(name, value, option) for option in args]
        fits = None in within_each
        if not fits:
            return next((m for m in within_each if m and m.where != name), _Misfit(name, value, _described(hint)))
    elif origin is Literal:
        fits = any(isinstance(value, type(choice)) and value == choice for choice in args)
    elif origin is list:
        fits = isinstance(value, (list, set, tuple))
        parts = [(f"{name}[{i}]", item, args[0]) for i, item in enumerate(value if fits else ())]
    elif origin is dict:
        fits = isinstance(value, Mapping)
        for key, item in (value if fits else {}).items():
            parts += [(f"{name}'s key {key!r}", key, args[0]), (f"{name}[{key!r}]", item, args[1])]
    elif hint in (int, float):
        fits = isinstance(value, (int, hint)) and not isinstance(value, bool)
    else:
        fits = hint is Any or isinstance(value, hint)
        if fits and dataclasses.is_dataclass(hint):
            parts = [(f"{name}.{key}", getattr(value, key), inner) for key, inner in get_type_hints(hint).items()]
    if not fits:
        return _Misfit(name, value, _described(hint))
    return next((m for part in parts if (m := _misfit(*part))), None)


def _described(hint: Any) -> str:
    """An annotation in words."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return str(args[1].says)
    if origin in (Union, UnionType):
        # In an order of our own: typing remembers equal unions, and gives the one that was written first somewhere.
        *first, last = sorted(map(_described, args), key=lambda text: (text == "None", text))
        return f"{', '.join(first)} or {last}"
    if origin is Literal:
        return f"one of {list(args)}"
    if origin is list:
        return f"a list of {_plural(args[0])}"
    if origin is dict:
        return f"a dict from {_plural(args[0])} to {_plural(args[1])}"
    words = {int: "an integer", float: "a number", str: "a string", bool: "True or False", NoneType: "None"}
    return words.get(hint) or f"a {hint.__name__}"


def _plural(hint: Any) -> str:
    article, _, noun = (text := _described(hint)).partition(" ")
    return f"{noun}s" if article in ("a", "an") else text


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
            f"Scaffold format {version!r} (format_version) with generator {generator!r} is not known to this "
            f"version of hf_lottalora, which draws format {FORMAT_VERSION} with {GENERATOR!r}. "
            "Upgrade with: pip install -U hf-lottalora"
        )
    return version


def check_scale(values: Mapping[str, Any]) -> None:
    """The scale rule, which the family limits."""
    rule, gain = values["scale"], get_family(values["family"]).scale_rule == "gain"
    number = not isinstance(rule, str) and rule is not None
    if not ((number and 1e-30 < rule < 1e30) or (rule in SCALE_RULES and (rule == "gain") == gain)):
        rules = [] if gain else [name for name in SCALE_RULES if name != "gain"]
        raise ValueError(
            f"scale must be None, {', '.join(map(repr, [*rules]))}{', ' if rules else ''}or a positive number for "
            f"family {values['family']!r}, got {rule!r}."
        )


def check_patterns(values: Mapping[str, Any]) -> None:
    """Fields that name modules by regular expressions, and families."""
    for name in ("family_pattern", "seed_pattern", "train_beta_pattern", "rank_pattern", "alpha_pattern"):
        for key in values[name]:
            _check_regex(name, key)
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        wanted = values[name]
        for pattern in [wanted] if isinstance(wanted, str) else wanted or () if name == "layers_pattern" else ():
            _check_regex(name, pattern)
    for key, family in values["family_pattern"].items():
        try:
            get_family(family)
        except ValueError as error:
            raise ValueError(f"family_pattern[{key!r}]: {error}") from None


def check_biases(values: Mapping[str, Any]) -> None:
    """Two fields that say which biases are trained."""
    if values["bias"] != "none" and values["biases"] == "train":
        raise ValueError(
            f"bias={values['bias']!r} and biases='train' both say which biases are trained. Drop one of them."
        )


def check_adapter(values: Mapping[str, Any]) -> None:
    """Options of where A and B come from, and what only LoRA has."""
    source = values["adapter"]
    of = {"basis_family": ("randlora", "nola"), "bases": ("nola",), "bases_shared": ("nola",)}
    for name, sources in of.items():
        if values[name] is not None and source not in sources:
            raise ValueError(
                f"{name}={values[name]!r} is for adapter={' or '.join(map(repr, sources))}, and this is "
                f"adapter={source!r}. Drop one of the two."
            )
    if source == "lora":
        return
    family = get_family(values["basis_family"])
    if not family.exact or family.name == "zero":
        raise ValueError(
            f"basis_family must be one that is drawn element by element, such as 'uniform' or 'binary', got "
            f"{family.name!r}."
        )
    lora_only = {
        "init_lora_weights": (values["init_lora_weights"] is not True, "it starts without an update, so that is True"),
        "embeddings": (values["embeddings"] == "lora", "bases as long as a vocabulary are not worth it"),
        "use_rslora": (source == "randlora" and values["use_rslora"], "the rank of its update is not r"),
    }
    for name, (given, reason) in lora_only.items():
        if given:
            raise ValueError(
                f"{name}={values[name]!r} is for adapter='lora', and this is adapter={source!r}: {reason}."
            )


def check_token_indices(given: Any) -> None:
    """Token ids, or such by the name of an embedding."""
    for ids in given.values() if isinstance(given, Mapping) else () if given is None else (given,):
        wanted = isinstance(ids, (list, tuple)) and bool(ids)
        if not (wanted and all(type(i) is int and i >= 0 for i in ids) and len(set(ids)) == len(ids)):
            raise ValueError(
                "trainable_token_indices must be a list of distinct token ids, or a dict of such lists by the name of "
                f"an embedding, got {given!r}."
            )


def check_refused(values: Mapping[str, Any]) -> None:
    """Options of PEFT's LoRA that make no sense here."""
    if not isinstance(values["init_lora_weights"], bool):
        raise ValueError(
            f"init_lora_weights={values['init_lora_weights']!r} makes no sense over a random scaffold: there is no "
            "pretrained weight to start from. Use True (A Kaiming uniform, B zero) or False (both Kaiming uniform)."
        )
    for option in dataclasses.fields(LoraConfig):
        value, default = values[option.name], _default(option)
        if option.name in REFUSED and not (type(value) is type(default) and value == default):
            raise ValueError(f"LottaLoraConfig does not take {option.name}: {REFUSED[option.name]}.")


def _check_regex(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, OverflowError) as error:
        raise ValueError(f"{name}: {pattern!r} is no regular expression: {error}.") from None


def is_rank(value: Any) -> bool:
    """Whether it is a positive integer."""
    return _misfit("", value, _RANK) is None


def _default(option: dataclasses.Field[Any]) -> Any:
    return option.default_factory() if callable(option.default_factory) else option.default
