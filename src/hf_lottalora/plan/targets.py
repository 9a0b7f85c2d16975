"""Which layers carry an adapter: those that a user names, a row of the table, or what the model's structure offers."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, NamedTuple

from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from ..config import DefaultTargets, LottaLoraConfig
from . import targets_0_1
from .modules import SurveyedModule
from .patterns import by_pattern
from .structure import NO_PROJECTION
from .survey import Survey

# model_type -> names of the attention's projections (paper section 5). Where there is no row, structure decides.
# 0.1's rows but for deepseek_v3's, which named one of its five projections.
ATTENTION_PROJECTIONS = {k: v for k, v in targets_0_1.ATTENTION_PROJECTIONS.items() if k != "deepseek_v3"}

_EMBEDS = re.compile(r"(^|\.)[^.]*embed[^.]*(\.|$)", re.IGNORECASE)


class Targets(NamedTuple):
    """The modules that carry an adapter, the head and embeddings apart.

    Attributes:
        paths: of the modules.
        rule: why these, for people to read.
    """

    paths: set[str]
    rule: str


def choose_targets(survey: Survey, config: LottaLoraConfig) -> Targets:
    """The modules that `config` means.

    Raises:
        ValueError: an artifact names a module that is not there, or a plain `nn.Module` is to have a default.
    """
    if config.resolved_targets is not None:
        return Targets(_recorded(survey, config.resolved_targets), "recorded in the artifact")
    targets = config.target_modules
    if targets is None or isinstance(targets, DefaultTargets):
        return _default(survey, config)
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return _all_linear(survey, config)
    return Targets(_matching(survey, config, config.target_modules), "target_modules")


def _recorded(survey: Survey, paths: Iterable[str]) -> set[str]:
    there = {module.path for module in survey.modules}
    missing = sorted(set(paths) - there)
    if missing:
        raise ValueError(
            f"resolved_targets: the artifact has adapters on {len(missing)} layers that {survey.class_name} lacks: "
            f"{missing[0]!r}"
            f"{near(missing[0], there)}. Nothing was loaded. Build the model from the artifact's config.json, with a "
            "transformers release that names its layers the same."
        )
    return set(paths)


def _default(survey: Survey, config: LottaLoraConfig) -> Targets:
    table = targets_0_1.ATTENTION_PROJECTIONS if written_by_0_1(config) else ATTENTION_PROJECTIONS
    names = table.get(survey.model_type or "")
    if names is not None:
        chosen = _matching(survey, config, names)
        if chosen or written_by_0_1(config):
            return Targets(chosen, f"attention projections of {survey.model_type}: {', '.join(names)}")
    if survey.architecture is None or written_by_0_1(config):
        what = f"model type {survey.model_type!r}" if survey.model_type else "a plain nn.Module"
        raise ValueError(f"There are no default target_modules for {what}. {layers_there_are(survey)}")
    usable = _usable(survey, config)
    mixing = _paths(config, (m for m in usable if m.mixes_tokens and (m.kind != "conv" or set(m.kernel) == {1})))
    if mixing:
        return Targets(mixing, "by structure: projections of the modules that attend or mix tokens")
    others = _paths(
        config,
        (m for m in usable if not _EMBEDS.search(m.path) and not NO_PROJECTION.search(m.path.rpartition(".")[2])),
    )
    return Targets(others, "by structure: nothing attends, so all linear layers and convolutions outside embeddings")


def _all_linear(survey: Survey, config: LottaLoraConfig) -> Targets:
    if written_by_0_1(config):
        read = targets_0_1.WEIGHT_IS_READ.get(survey.model_type or "", ())
        linear = (m for m in survey.modules if m.path.rpartition(".")[2] not in read)
        return Targets(_paths(config, (m for m in linear if m.kind == "linear" and not m.in_head)), "all-linear")
    usable = _usable(survey, config)
    if chosen := _paths(config, (m for m in usable if m.kind == "linear")):
        return Targets(chosen, "all-linear")
    convolutions = _paths(config, (m for m in usable if m.kind == "conv"))
    return Targets(convolutions, "all-linear: there are no linear layers, so all convolutions")


def _usable(survey: Survey, config: LottaLoraConfig) -> list[SurveyedModule]:
    """Modules that nobody named and that can carry an adapter with these options: their own, which is called."""
    tied = (alias for tensor in survey.tensors if len(tensor.holders) > 1 for alias in tensor.aliases)
    shared = {alias.rpartition(".")[0] for alias in tied}
    alone = (m for m in survey.modules if len(m.places) == 1 and m.path not in shared)
    return [m for m in alone if not m.in_head and not m.is_read and _fits(m, config)]


def _fits(module: SurveyedModule, config: LottaLoraConfig) -> bool:
    if module.kind == "conv" and (config.layer_norm or (config.dora_magnitude == "inputs" and config.lora_dropout)):
        return False
    if module.kind == "projection" and (config.layer_norm or config.lora_dropout):
        return False
    rank: int = by_pattern(config, "rank_pattern", module.path, config.r)
    return module.kind in ("linear", "conv", "projection") and rank % module.groups == 0


def _paths(config: LottaLoraConfig, modules: Iterable[SurveyedModule]) -> set[str]:
    """Those that `exclude_modules` and `layers_to_transform` leave."""
    return {m.path for m in modules if _matches(config, m.path, [m.path.rpartition(".")[2]])}


def _matching(survey: Survey, config: LottaLoraConfig, targets: Any) -> set[str]:
    return {m.path for m in survey.modules if any(_matches(config, place, targets) for place in m.places)}


def _matches(config: LottaLoraConfig, path: str, targets: Any) -> bool:
    """PEFT's rules of matching, with other targets than the config's."""
    wanted = config.target_modules
    try:
        config.target_modules = targets
        found = check_target_module_exists(config, path)
        if found in (False, None) and config.layers_to_transform is not None:
            # PEFT looks for the number of a layer behind two names, of which a bare backbone has one.
            found = check_target_module_exists(config, f"model.{path}")
    finally:
        config.target_modules = wanted
    return bool(found)


def written_by_0_1(config: LottaLoraConfig) -> bool:
    """Whether the config is of an artifact that does not say what was chosen: then 0.1's rules hold."""
    return (config.lottalora_version or "").startswith("0.1.")


def check_choice(survey: Survey, config: LottaLoraConfig, targets: Targets) -> None:
    """Warn of names and layers that match nothing beside others that do, as PEFT's lists for several models may."""
    if config.resolved_targets is not None:
        return
    if survey.unread_classes and targets.rule.startswith(("by structure", "all-linear")):
        warnings.warn(
            f"The source of {', '.join(survey.unread_classes)} cannot be read, so it is unknown which layers attend "
            "there and whether all are called. Look at print(model.get_plan()), or pass target_modules by name.",
            stacklevel=2,
        )
    paths = {place for module in survey.modules for place in module.places}
    for option in ("target_modules", "exclude_modules"):
        names = getattr(config, option) or ()
        if not isinstance(names, (str, DefaultTargets)):
            _warn(option, [n for n in names if not any(p == n or p.endswith(f".{n}") for p in paths)], paths)
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = getattr(config, name) or {}
        adapted = [*targets.paths, *(m.path for m in survey.modules if m.in_head or m.kind == "embedding")]
        _warn(
            name, [key for key in pattern if not any(get_pattern_key([key], path) == key for path in adapted)], adapted
        )
    layers = config.layers_to_transform
    if isinstance(layers, list):
        found = {int(number) for path in targets.paths for number in re.findall(r"(?:^|\.)(\d+)\.", path)}
        if missing := sorted(set(layers) - found):
            warnings.warn(
                f"layers_to_transform names layers {missing}, where {survey.class_name} has none that carries an "
                "adapter. They are ignored.",
                UserWarning,
                stacklevel=2,
            )


def _warn(option: str, names: Iterable[str], paths: Iterable[str]) -> None:
    for name in sorted(names):
        warnings.warn(
            f"{option} names {name!r}, which matches no layer{near(name, paths)}. It is ignored.", stacklevel=2
        )


def near(name: str, paths: Iterable[str]) -> str:
    """`; did you mean ...?` with the names in these paths that look like it, "" where none does.

    Example:
        >>> near("q_porj", ["layers.0.q_proj", "layers.0.k_proj"])
        "; did you mean 'q_proj'?"
    """
    parts = name.count(".") + 1
    ends = {".".join(path.split(".")[-parts:]) for path in paths}
    close = get_close_matches(name, sorted(ends - {name}), n=1, cutoff=0.75)
    return f"; did you mean {', '.join(map(repr, close))}?" if close else ""


def layers_there_are(survey: Survey) -> str:
    """What to pass instead: a model's linear layers, or convolutions, or its head; and why others are no choice."""
    linear, convolutions = (_starred(m.path for m in survey.modules if m.kind == kind) for kind in ("linear", "conv"))
    kind, names = ("linear layers", linear) if linear else ("convolutions", convolutions)
    advice = f"Pass target_modules; its {kind} are: {', '.join(names) or 'none'}."
    if names and all(m.in_head for m in survey.modules if m.kind in ("linear", "conv")):
        advice = f"Pass head='lora' to adapt its head alone ({', '.join(names)})."
    others = dict.fromkeys(f"{m.type_name} {m.reason}" for m in survey.modules if m.reason)
    return f"{advice} Without a choice: {'; '.join(others)}." if others else advice


def _starred(paths: Iterable[str]) -> list[str]:
    """Paths with the numbers of their layers as stars, each once."""
    return list(dict.fromkeys(re.sub(r"(^|\.)\d+(?=\.)", r"\1*", path) for path in paths))
