"""What PreLoRA is told, checked before anything changes."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ..config import LottaLoraConfig
from ..options import is_rank
from ..plan.plan import Plan
from ..plan.planner import plan_from_survey
from ..plan.survey import survey_model

RANK_BY = ("weights", "gradients")


def check_settings(settings: dict[str, Any]) -> None:
    """Whether the arguments of `PreLoraCallback` make sense by themselves.

    Raises:
        ValueError: the first that does not, by name.
    """
    least = {"window": 1, "windows": 2, "joint_steps": 1, "rewarmup_steps": 0}
    for name, minimum in least.items():
        value = settings[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}.")
    thresholds, ranks = settings["thresholds"], settings["ranks"]
    positive = [isinstance(value, (int, float)) and 0 < value < math.inf for value in thresholds]
    if len(positive) != 2 or not all(positive):
        raise ValueError(
            "thresholds must be two positive numbers, percent that weights and loss may change, such as (0.5, 2.5); "
            f"got {thresholds!r}."
        )
    if not ranks or not all(map(is_rank, ranks)) or any(a >= b for a, b in pairwise(ranks)):
        raise ValueError(
            f"ranks must be positive integers in ascending order, such as (4, 8, 16, 32), got {ranks!r}: a module "
            "whose weights change more gets one that stands later."
        )
    if settings["rank_by"] not in RANK_BY:
        raise ValueError(f"rank_by must be one of {list(RANK_BY)}, got {settings['rank_by']!r}.")
    for name, pattern in settings["families"].items():
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(f"families[{name!r}]: {pattern!r} is no regular expression: {error}.") from None


def planned(model: nn.Module, config: LottaLoraConfig, ranks: Sequence[int]) -> Plan:
    """The plan of adapters over the model as it is, with the smallest rank; each rank was found possible.

    Raises:
        ValueError: the config draws weights, has ranks of its own, adapts what cannot be trained under an adapter, or
            cannot have one of the ranks.
    """
    if config.redraw != "none":
        raise ValueError(
            f"PreLoRA trains the model whole and then adapts what it has become; redraw={config.redraw!r} would draw "
            "over that. Pass LottaLoraConfig(redraw='none', ...)."
        )
    if config.adapter != "lora":
        raise ValueError(f"PreLoRA chooses ranks of LoRA, and adapter={config.adapter!r} is another. Leave it out.")
    for name in ("rank_pattern", "alpha_pattern"):
        if getattr(config, name):
            raise ValueError(
                f"PreLoRA chooses a rank for each module, and its alpha. Leave {name} out, and pass ranks."
            )
    survey = survey_model(model)
    of_rank: list[dict[str, Any]] = [{"r": rank} for rank in ranks]
    plans = [plan_from_survey(survey, dataclasses.replace(config, **options)) for options in of_rank]
    for adapter in plans[0].adapters:
        if adapter.kind not in ("linear", "conv"):
            raise ValueError(
                f"PreLoRA trains weights under their adapters, which {adapter.path!r} ({adapter.kind}) does not "
                "support: linear layers and convolutions do. Leave it out of target_modules and "
                "trainable_token_indices, and embeddings='lora' too."
            )
    for plan, rank in zip(plans, ranks, strict=True):
        if other := {a.path for a in plan.adapters} ^ {a.path for a in plans[0].adapters}:
            raise ValueError(
                f"{min(other)!r} can have some of ranks={tuple(ranks)}, and {rank} not or alone. Choose others, or "
                "leave it out of target_modules."
            )
    return plans[0]


def check_training(settings: Mapping[str, Any], max_steps: int, schedule: Any) -> None:
    """Whether this training can come to its other phases.

    Raises:
        ValueError: it is shorter than the test needs, or its schedule cannot be gone on with.
    """
    windows, window = settings["windows"], settings["window"]
    if windows * window >= max_steps:
        raise ValueError(
            f"The test compares windows={windows} of window={window} steps, so that it first passes after "
            f"{windows * window}, and training ends after {max_steps}. Choose a shorter window, or train longer."
        )
    if not isinstance(schedule, LambdaLR):
        raise ValueError(
            f"PreLoRA goes on with the schedule where it was, which a {type(schedule).__name__} does not know. Choose "
            "another lr_scheduler_type, such as 'cosine' or 'linear'."
        )


def stored_state(folder: Path, callback: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint has of a callback of these settings.

    Raises:
        ValueError: it was made without one, with other settings, or without an optimizer.
    """
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    stored = state["stateful_callbacks"].get(callback)
    if stored is None:
        raise ValueError(f"{folder} was made without {callback}, and cannot be gone on with. Train from the start.")
    mine = json.loads(json.dumps(settings))
    other = [name for name in mine if stored["args"].get(name) != mine[name]]
    if other:
        differing = "; ".join(f"{name}={stored['args'].get(name)!r}, here {mine[name]!r}" for name in other)
        raise ValueError(
            f"{folder} was made with another {callback}: {differing}. Nothing has changed. Resume with its settings."
        )
    if not (folder / "optimizer.pt").exists():
        raise ValueError(f"{folder} has no optimizer (save_only_model=True), and cannot be gone on with.")
    return dict(stored["attributes"])
