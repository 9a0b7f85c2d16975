"""Which modules carry an adapter, and of what size: the part of the plan that is made from `target_modules`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
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
    targets -= {f"{m.path}.out_proj" for m in survey.modules if m.kind == "projection" and m.path in targets}
    adapters: list[PlannedAdapter] = []
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
            _check_looked_up_here(module, survey)
            adapters.extend(_adapters(module, config))
    if not adapters:
        raise ValueError(
            f"target_modules={_shown(config.target_modules)} matches no linear layer, convolution or embedding of "
            f"{survey.class_name} outside what is trained as a whole. {_linear_layers(survey)}"
        )
    embedding = _embedding_adapter(survey, config) if config.embeddings == "lora" else None
    if embedding is not None and embedding not in adapters and not under(embedding.path, extra):
        adapters.append(embedding)
    adapters.extend(_trained_rows(survey, config, extra, {adapter.path for adapter in adapters}))
    for tensor in survey.tensors:
        shared = [a.path for a in adapters if a.weight in tensor.aliases]
        if shared and len(tensor.aliases) > 1 and not tensor.tied_head:
            raise ValueError(
                f"{shared[0]!r} shares its weight ({', '.join(tensor.aliases)}): an adapter on one place would change "
                "the other, or miss it. Leave it out of target_modules."
            )
    return _with_tied_head(adapters, survey)


def _with_tied_head(adapters: list[PlannedAdapter], survey: Survey) -> list[PlannedAdapter]:
    """A head that is tied to an adapted token embedding shares its adapter."""
    embedding = next((a for a in adapters if a.path == survey.input_embeddings), None)
    if embedding is None or survey.tied_tensor is None:
        return adapters
    head = str(survey.output_embeddings)
    return [*(a for a in adapters if a.path != head), replace(embedding, path=head, kind="tied_head")]


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
    _check_looked_up_here(module, survey)
    (adapter,) = _adapters(module, config)
    return adapter if adapter.numel < module.in_features * module.out_features else None


def _check_looked_up_here(module: SurveyedModule, survey: Survey) -> None:
    """Refuse an embedding whose table is looked up elsewhere too, where the adapter would be missed."""
    if module.kind != "embedding":
        return
    users = next(t.aliases for t in survey.tensors if f"{module.path}.weight" in t.aliases)
    others = [m.path for m in survey.modules if m.kind == "embedding" and f"{m.path}.weight" in users]
    if len(others) > 1:
        raise ValueError(
            f"An adapter on {module.path!r} is not supported: in {survey.class_name} its table is looked up through "
            f"several modules ({', '.join(others)}). Pass embeddings='train' or 'frozen', and leave them out of "
            "target_modules."
        )


def _trained_rows(
    survey: Survey, config: LottaLoraConfig, extra: set[str], adapted: set[str]
) -> Iterator[PlannedAdapter]:
    """The rows that `trainable_token_indices` names: of the token embedding, or of embeddings by name."""
    given = config.token_indices or {}
    tables = given if isinstance(given, Mapping) else {survey.input_embeddings or "embed_tokens": given}
    for name, ids in tables.items():
        modules = [m for m in survey.modules if m.path == name or m.path.endswith(f".{name}")]
        if not modules:
            raise ValueError(f"trainable_token_indices names {name!r}, but {survey.class_name} has no such module.")
        for module in modules:
            whole, where = under(module.path, extra), f"trainable_token_indices names rows of {module.path!r}"
            if module.kind != "embedding" or _weight_is_read(module, survey):
                raise ValueError(
                    f"{where}, a {module.type_name}. Rows are trained of an nn.Embedding that looks ids up; a head "
                    "that is tied to it follows."
                )
            if whole or module.path in adapted:
                what = "modules_to_save trains as a whole" if whole else "carries an adapter"
                raise ValueError(f"{where}, which {what}. Drop one of the two.")
            _check_looked_up_here(module, survey)
            table = next(t for t in survey.tensors if f"{module.path}.weight" in t.aliases)
            wrong = [i for i in ids if i >= module.in_features or i == table.zero_row]
            if wrong:
                raise ValueError(
                    f"{where}, which has {module.in_features} rows of which {table.zero_row} is padding, got {wrong}."
                )
            sizes = (module.in_features, module.out_features, len(ids), 1.0)
            yield PlannedAdapter(module.path, "rows", *sizes, rows=tuple(sorted(ids)))


def _adapter(module: SurveyedModule, config: LottaLoraConfig) -> PlannedAdapter:
    if module.kind == "other":
        part = module.type_name == "NonDynamicallyQuantizableLinear"
        hint = "it is part of an nn.MultiheadAttention: name that" if part else "leave it out of target_modules"
        raise ValueError(
            f"target_modules matches {module.path!r}, a {module.type_name}. Adapters go on nn.Linear, Conv1D, "
            f"nn.Conv1d, 2d, 3d, nn.Embedding and nn.MultiheadAttention, not on classes that compute something else; "
            f"{hint}."
        )
    rank: int = by_pattern(config, "rank_pattern", module.path, config.r)
    alpha: float = by_pattern(config, "alpha_pattern", module.path, config.lora_alpha)
    scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
    if rank % module.groups:
        raise ValueError(
            f"{module.path!r} is a convolution with groups={module.groups}: its rank must be a multiple of that, got "
            f"r={rank}. Pass rank_pattern for it, or leave it out of target_modules."
        )
    if module.kind == "conv" and config.layer_norm:
        raise ValueError(f"layer_norm is not supported on convolutions, and {module.path!r} is one.")
    if module.kind == "embedding" and (config.layer_norm or config.residual):
        what = "layer_norm" if config.layer_norm else "residual"
        raise ValueError(
            f"{what} is for layers that multiply, and {module.path!r} is an embedding. Leave it out of target_modules."
        )
    if module.kind == "embedding" and config.lora_bias:
        raise ValueError(
            f"lora_bias is for layers with a bias, and {module.path!r} is an embedding. Leave it as it is, or "
            "drop lora_bias."
        )
    dora = config.dora_magnitude if config.use_dora else None
    if module.kind == "conv" and dora == "inputs" and config.lora_dropout:
        raise ValueError(
            f"lora_dropout and dora_magnitude='inputs' do not go together on convolutions, and {module.path!r} is one."
        )
    sizes = (module.in_features, module.out_features, rank, scaling, module.kernel, module.groups)
    kind = cast(AdapterKind, module.kind)
    beta: bool = by_pattern(config, "train_beta_pattern", module.path, config.train_beta)
    return PlannedAdapter(module.path, kind, *sizes, beta, dora, config.layer_norm, config.residual, config.lora_bias)


def _adapters(module: SurveyedModule, config: LottaLoraConfig) -> Iterator[PlannedAdapter]:
    """The adapters of one module: one, or one for each of the matrices of an `nn.MultiheadAttention`."""
    adapter = _adapter(module, config)
    if not module.matrices:
        yield adapter
    elif config.layer_norm or config.lora_dropout:
        what = "layer_norm" if config.layer_norm else "lora_dropout"
        raise ValueError(
            f"{what} is not supported on nn.MultiheadAttention, whose adapters are summed into its matrices, and "
            f"{module.path!r} is one."
        )
    elif config.lora_bias and len(module.matrices) != 2:
        raise ValueError(
            f"lora_bias is not supported on nn.MultiheadAttention with kdim or vdim, whose three projections share one "
            f"bias, and {module.path!r} is one."
        )
    for name, (weight, outputs, inputs) in module.matrices.items():
        path = f"{module.path}.{name}"
        yield replace(adapter, path=path, matrix=weight, in_features=inputs, out_features=outputs)


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
