"""Which layers carry an adapter: those that a user names, a row of the table, or what the model's structure offers."""

from __future__ import annotations

import re
import warnings
from collections.abc import Container, Iterable
from typing import Any, NamedTuple

from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from ..config import LottaLoraConfig
from ..recorded import DefaultTargets
from . import targets_0_1
from .left_out import LeftOut, condensed, layers_outside_head, why_left_out
from .modules import SurveyedModule
from .names import layers_there_are, meant, near
from .patterns import under
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
        left_out: what the rule would have taken, and why it has not.
    """

    paths: set[str]
    rule: str
    left_out: tuple[LeftOut, ...] = ()


def choose_targets(survey: Survey, config: LottaLoraConfig, whole: set[str]) -> Targets:
    """The modules that `config` means; `whole` are the paths that `modules_to_save` trains as a whole.

    Raises:
        ValueError: an artifact names a module that is not there, or a plain `nn.Module` is to have a default.
    """
    if config.resolved_targets is not None:
        return Targets(_recorded(survey, config.resolved_targets), "recorded in the artifact")
    targets = config.target_modules
    if targets is None or isinstance(targets, DefaultTargets):
        return _default(survey, config, whole)
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return _all_linear(survey, config, whole)
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


def _default(survey: Survey, config: LottaLoraConfig, whole: set[str]) -> Targets:
    table = targets_0_1.ATTENTION_PROJECTIONS if written_by_0_1(config) else ATTENTION_PROJECTIONS
    names = table.get(survey.model_type or "")
    if names is not None:
        chosen = _matching(survey, config, names)
        if chosen or written_by_0_1(config):
            return Targets(chosen, f"attention projections of {survey.model_type}: {', '.join(names)}")
    if survey.architecture is None or written_by_0_1(config):
        what = f"model type {survey.model_type!r}" if survey.model_type else "a plain nn.Module"
        raise ValueError(f"There are no default target_modules for {what}. {layers_there_are(survey)}")
    there = list(layers_outside_head(survey))
    mixing = (m for m in there if m.mixes_tokens and (m.kind != "conv" or set(m.kernel) == {1}))
    rule = "by structure: projections of the modules that attend or mix tokens"
    projections = _choice(survey, config, whole, mixing, rule)
    if projections.paths:
        return projections
    some = any(module.mixes_tokens for module in survey.modules)
    why = "what attends offers no layer to adapt" if some else "nothing attends"
    others = (m for m in there if not _EMBEDS.search(m.path) and not NO_PROJECTION.search(m.path.rpartition(".")[2]))
    rule = f"by structure: {why}, so all linear layers and convolutions outside embeddings"
    return _choice(survey, config, whole, others, rule)


def _all_linear(survey: Survey, config: LottaLoraConfig, whole: set[str]) -> Targets:
    if written_by_0_1(config):
        read = targets_0_1.WEIGHT_IS_READ.get(survey.model_type or "", ())
        linear = (m for m in survey.modules if m.path.rpartition(".")[2] not in read)
        return Targets(_paths(config, (m for m in linear if m.kind == "linear" and not m.in_head)), "all-linear")
    there = list(layers_outside_head(survey))
    chosen = _choice(survey, config, whole, there, "all-linear", {"linear"})
    if chosen.paths:
        return chosen
    some = any(m.kind == "linear" for m in there)
    why = "no linear layer can carry an adapter" if some else "there are no linear layers"
    return _choice(survey, config, whole, there, f"all-linear: {why}, so all convolutions", {"conv"})


def _choice(
    survey: Survey,
    config: LottaLoraConfig,
    whole: set[str],
    modules: Iterable[SurveyedModule],
    rule: str,
    kinds: Container[str] = ("linear", "conv", "projection"),
) -> Targets:
    """Of modules that nobody named, those that can carry an adapter with these options: their own, which is called."""
    tied = (alias for tensor in survey.tensors if len(tensor.holders) > 1 for alias in tensor.aliases)
    shared = {alias.rpartition(".")[0] for alias in tied}
    wanted = _paths(config, modules := list(modules))
    reasons = {m.path: why_left_out(m, config, shared, kinds) for m in modules if m.path in wanted}
    left_out = {path: why for path, why in reasons.items() if why is not None and not under(path, whole)}
    return Targets(wanted - {path for path, why in reasons.items() if why}, rule, condensed(left_out))


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
    """Warn of names and layers that match nothing beside others that do, as PEFT's lists for several models may; of
    layers that an option leaves out; and of code that cannot be read.
    """
    if config.resolved_targets is not None:
        return
    for left in targets.left_out:
        if left.option:
            warnings.warn(
                f"{left.option} leaves out {left}. So other values of it change which layers carry adapters. To decide "
                "that yourself, name layers in target_modules, or these in exclude_modules.",
                stacklevel=2,
            )
    if survey.unread_classes and targets.rule.startswith(("by structure", "all-linear")):
        warnings.warn(
            f"The source of {', '.join(survey.unread_classes)} cannot be read, so it is unknown which layers attend "
            "there and whether all are called. Look at print(model.get_plan()), or pass target_modules by name.",
            stacklevel=2,
        )
    paths = {place for module in survey.modules for place in module.places}
    for option in ("target_modules", "exclude_modules"):
        names = getattr(config, option) or ()
        if isinstance(names, str):
            missed = option == "exclude_modules" and not any(re.fullmatch(names, path) for path in paths)
            _warn(option, [names] * missed, paths, as_given=True)
        elif not isinstance(names, DefaultTargets):
            _warn(option, [n for n in names if not any(p == n or p.endswith(f".{n}") for p in paths)], paths)
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = getattr(config, name) or {}
        adapted = [*targets.paths, *(m.path for m in survey.modules if m.in_head or m.kind == "embedding")]
        adapted += [path for left in targets.left_out for path in left.paths]  # of which was warned already
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


def _warn(option: str, names: Iterable[str], paths: Iterable[str], as_given: bool = False) -> None:
    for name in sorted(names):
        guess = meant(name if as_given else [name], paths)
        warnings.warn(f"{option} names {name!r}, which matches no layer{guess}. It is ignored.", stacklevel=2)
