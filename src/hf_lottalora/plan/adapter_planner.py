"""Which modules carry an adapter, and of what size: the part of the plan that is made from `target_modules`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

from peft.tuners.tuners_utils import check_target_module_exists

from ..config import LottaLoraConfig
from .patterns import by_pattern, under
from .plan import AdapterKind, PlannedAdapter
from .survey import Survey, SurveyedModule
from .targets import ATTENTION_PROJECTIONS, WEIGHT_IS_READ

ADAPTED_HEADS = ("lora", "lora_bias")


def plan_adapters(survey: Survey, config: LottaLoraConfig, extra: set[str]) -> list[PlannedAdapter]:
    """Every adapter; `extra` are the paths that `modules_to_save` trains as a whole.

    Raises:
        ValueError: no module matches the targets, or one that cannot carry an adapter does.
    """
    targets = _target_names(survey, config)
    adapters = []
    for module in survey.modules:
        whole = under(module.path, extra) or (module.in_head and config.head not in ADAPTED_HEADS)
        if (module.path in targets and not whole) or (
            module.in_head and config.head in ADAPTED_HEADS and module.kind == "linear" and not whole
        ):
            if _weight_is_read(module, survey):
                raise ValueError(
                    f"target_modules matches {module.path!r}, whose weight {survey.class_name} reads without calling "
                    "the module, so that an adapter would do nothing. Leave it out of target_modules."
                )
            adapters.append(_adapter(module, config, "linear", "conv"))
    if not adapters:
        raise ValueError(
            f"target_modules={_shown(config.target_modules)} matches no linear layer or convolution of "
            f"{survey.class_name} outside what is trained as a whole. {_linear_layers(survey)}"
        )
    for tensor in survey.tensors:
        shared = [a.path for a in adapters if f"{a.path}.weight" in tensor.aliases]
        if shared and len(tensor.aliases) > 1 and not tensor.tied_head:
            raise ValueError(
                f"{shared[0]!r} shares its weight ({', '.join(tensor.aliases)}): an adapter on one place would change "
                "the other, or miss it. Leave it out of target_modules."
            )
    embedding = _embedding_adapter(survey, config) if config.embeddings == "lora" else None
    if embedding is not None and not under(embedding.path, extra):
        adapters.append(embedding)
        if survey.tied_tensor is not None:
            _check_tied_head(survey)
            adapters = [a for a in adapters if a.path != survey.output_embeddings]
            adapters.append(replace(embedding, path=str(survey.output_embeddings), kind="tied_head"))
    return adapters


def _embedding_adapter(survey: Survey, config: LottaLoraConfig) -> PlannedAdapter | None:
    """The adapter of the token embedding, None where that is smaller than its adapter.

    Other tables are not adapted: some architectures read a position table's weight past its module's forward.
    """
    module = next((m for m in survey.modules if m.path == survey.input_embeddings), None)
    if module is None or module.kind != "embedding":
        raise ValueError(
            f"embeddings='lora' needs a token embedding that looks up ids, and {survey.class_name} names none. Pass "
            "embeddings='train' or 'frozen'."
        )
    users = next(t.aliases for t in survey.tensors if f"{module.path}.weight" in t.aliases)
    others = [m.path for m in survey.modules if m.kind == "embedding" and f"{m.path}.weight" in users]
    if len(others) > 1:
        raise ValueError(
            f"embeddings='lora' is not supported for {survey.class_name}: its token embedding is looked up through "
            f"several modules ({', '.join(others)}). Pass embeddings='train' or 'frozen'."
        )
    adapter = _adapter(module, config, "embedding")
    return adapter if adapter.numel < module.in_features * module.out_features else None


def _check_tied_head(survey: Survey) -> None:
    head = next((m for m in survey.modules if m.path == survey.output_embeddings), None)
    if head is not None and head.reason:
        raise ValueError(
            f"embeddings='lora' would adapt the head {head.path!r} with the tied embedding, but it is a "
            f"{head.type_name}{_whose_forward(head)}. Pass embeddings='train' or 'frozen'."
        )


def _adapter(module: SurveyedModule, config: LottaLoraConfig, *kinds: str) -> PlannedAdapter:
    if module.kind not in kinds:
        hint = "pass embeddings='lora' instead" if module.kind == "embedding" else "leave it out of target_modules"
        raise ValueError(
            f"target_modules matches {module.path!r}, a {module.type_name}{_whose_forward(module)}. Adapters go on "
            f"nn.Linear, Conv1D and nn.Conv1d, 2d and 3d, not on classes that compute something else; {hint}."
        )
    rank: int = by_pattern(config, "rank_pattern", module.path, config.r)
    alpha: float = by_pattern(config, "alpha_pattern", module.path, config.lora_alpha)
    scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
    if rank % module.groups:
        raise ValueError(
            f"{module.path!r} is a convolution with groups={module.groups}: its rank must be a multiple of that, got "
            f"r={rank}. Pass rank_pattern for it, or leave it out of target_modules."
        )
    if module.kind == "conv" and module.own_forward and (config.residual or config.lora_dropout):
        raise ValueError(
            f"{'residual' if config.residual else 'lora_dropout'} is not supported on convolutions with a forward of "
            f"their own, and {module.path!r}, a {module.type_name}, is one."
        )
    if module.kind == "conv" and (config.layer_norm or (config.use_dora and module.groups > 1)):
        what = "layer_norm" if config.layer_norm else "use_dora with groups"
        raise ValueError(f"{what} is not supported on convolutions, and {module.path!r} is one.")
    dora = config.dora_magnitude if config.use_dora else None
    if module.kind == "conv" and dora == "inputs" and config.lora_dropout:
        raise ValueError(
            f"lora_dropout and dora_magnitude='inputs' do not go together on convolutions, and {module.path!r} is one."
        )
    sizes = (module.in_features, module.out_features, rank, scaling, module.kernel, module.groups)
    kind = cast(AdapterKind, module.kind)
    beta: bool = by_pattern(config, "train_beta_pattern", module.path, config.train_beta)
    options = (beta, dora, config.layer_norm, config.residual)
    return PlannedAdapter(module.path, kind, *sizes, *options, module.own_forward)


def _whose_forward(module: SurveyedModule) -> str:
    return f", whose forward {module.reason}" if module.reason else ""


def _target_names(survey: Survey, config: LottaLoraConfig) -> set[str]:
    """Paths of the modules that `config.target_modules` means, by PEFT's matching rules."""
    if config.target_modules is None:
        names = ATTENTION_PROJECTIONS.get(survey.model_type or "")
        if names is None:
            what = f"model type {survey.model_type!r}" if survey.model_type else "a plain nn.Module"
            raise ValueError(f"There are no default target_modules for {what}. {_linear_layers(survey)}")
        config.target_modules = set(names)
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        excluded = [] if isinstance(config.exclude_modules, str) else config.exclude_modules or []
        return {
            m.path
            for m in survey.modules
            if m.kind == "linear"
            and not m.in_head
            and not any(m.path == e or m.path.endswith(f".{e}") for e in excluded)
            and not _weight_is_read(m, survey)
            and not (isinstance(config.exclude_modules, str) and re.fullmatch(config.exclude_modules, m.path))
        }
    return {m.path for m in survey.modules if check_target_module_exists(config, m.path)}


def _weight_is_read(module: SurveyedModule, survey: Survey) -> bool:
    return module.path.rpartition(".")[2] in WEIGHT_IS_READ.get(survey.model_type or "", ())


def _linear_layers(survey: Survey) -> str:
    names: Mapping[str, None] = dict.fromkeys(
        re.sub(r"(^|\.)\d+(?=\.)", r"\1*", module.path) for module in survey.modules if module.kind == "linear"
    )
    return f"Pass target_modules; its linear layers are: {', '.join(names) or 'none'}."


def _shown(targets: Iterable[str] | None) -> Any:
    return sorted(targets) if isinstance(targets, (set, list)) else targets
