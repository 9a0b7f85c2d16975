"""Layers that a choice by nobody's names leaves out, and why: shown in the plan, so that it is not done silently."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import NamedTuple

from ..config import LottaLoraConfig
from .modules import SurveyedModule
from .patterns import by_pattern
from .survey import Survey

_SHOWN = 8  # paths of one reason


class LeftOut(NamedTuple):
    """Layers without an adapter, of those that the rule is about.

    Attributes:
        paths: of these layers, the numbers of repeated ones as stars.
        reason: why, for people to read.
        option: what in the config decides it, with its value; "" where nothing does.
    """

    paths: tuple[str, ...]
    reason: str
    option: str = ""

    def __str__(self) -> str:
        more = f" and {len(self.paths) - _SHOWN} more" if len(self.paths) > _SHOWN else ""
        return f"{', '.join(self.paths[:_SHOWN])}{more}: {self.reason}"


def layers_outside_head(survey: Survey) -> Iterator[SurveyedModule]:
    """The modules outside the head that multiply with a matrix of their own, whether an adapter can go there or not."""
    aliases = [(alias, tensor.kind) for tensor in survey.tensors for alias in tensor.aliases]
    owners = [(re.sub(r"(\.parametrizations\.\w+)?\.\w+$", "", alias), kind) for alias, kind in aliases]
    matrices, tables = ({owner for owner, kind in owners if kind == wanted} for wanted in ("matrix", "embedding"))
    for module in survey.modules:
        if module.kind == "other":
            part = module.type_name == "NonDynamicallyQuantizableLinear"  # of an nn.MultiheadAttention, which has it
            multiplies = bool(module.path in matrices or module.reason) and module.path not in tables and not part
        else:
            multiplies = module.kind != "embedding"
        if multiplies and not module.in_head:
            yield module


def why_left_out(
    module: SurveyedModule, config: LottaLoraConfig, shared: Container[str], kinds: Container[str]
) -> tuple[str, str] | None:
    """Why a module that nobody named carries no adapter, and the option that decides it; None where it can.

    Args:
        module: one of `layers_outside_head`.
        config: its options.
        shared: paths of modules whose weight others have too.
        kinds: of the modules that the rule takes.
    """
    if len(module.places) > 1 or module.path in shared:
        return "one weight in several places", ""
    if module.is_read:
        return "the weight is read without a call, so that an adapter would do nothing", ""
    if module.kind == "other":
        return f"no adapter goes on {module.type_name}{module.reason and f', whose forward {module.reason}'}", ""
    if module.kind not in kinds:
        return "all-linear does not take it: name it in target_modules", ""
    what = {"conv": "convolutions", "projection": "nn.MultiheadAttention"}.get(module.kind)
    if what and config.layer_norm:
        return f"layer_norm is not supported on {what}", "layer_norm=True"
    dropout = f"lora_dropout={config.lora_dropout}"
    if module.kind == "projection" and config.lora_dropout:
        return f"lora_dropout is not supported on {what}", dropout
    if module.kind == "conv" and config.dora_magnitude == "inputs" and config.lora_dropout:
        reason = f"lora_dropout and dora_magnitude='inputs' do not go together on {what}"
        return reason, f"{dropout} with dora_magnitude='inputs'"
    rank: int = by_pattern(config, "rank_pattern", module.path, config.r)
    if rank % module.groups:
        option = f"r={config.r}" if rank == config.r else "rank_pattern"
        return "the rank is no multiple of the convolution's groups", option
    return None


def condensed(reasons: Mapping[str, tuple[str, str]]) -> tuple[LeftOut, ...]:
    """What is left out, by its reason, from reason and option by path."""
    paths: dict[tuple[str, str], list[str]] = {}
    for path, why in reasons.items():
        paths.setdefault(why, []).append(path)
    return tuple(LeftOut(tuple(starred(found)), *why) for why, found in paths.items())


def starred(paths: Iterable[str]) -> list[str]:
    """Paths with the numbers of their layers as stars, each once."""
    return list(dict.fromkeys(re.sub(r"(^|\.)\d+(?=\.)", r"\1*", path) for path in paths))
