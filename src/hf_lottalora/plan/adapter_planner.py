"""Which modules carry an adapter, and of what size: the part of the plan that is made from `target_modules`."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import cast

from ..config import LottaLoraConfig
from ..layers.bases import SIDE
from .modules import SurveyedModule
from .names import layers_there_are, meant
from .patterns import by_pattern, under
from .plan import AdapterKind, PlannedAdapter
from .survey import Survey
from .targets import Targets, choose_targets, written_by_0_1

ADAPTED_HEADS = ("lora", "lora_bias")
_LARGEST = 2**31  # elements of one tensor of an adapter; more is a slip of the pen


def plan_adapters(survey: Survey, config: LottaLoraConfig, extra: set[str]) -> tuple[list[PlannedAdapter], Targets]:
    """Every adapter, and which modules were chosen; `extra` are the paths that `modules_to_save` trains as a whole.

    Raises:
        ValueError: no module matches the targets, one that cannot carry an adapter does, or `resolved_targets` are
            not what the other options mean.
    """
    targets, wanted = _wanted(survey, config, extra)
    if config.resolved_targets is not None and config.chooses_anew():
        _check_resolved(survey, config, extra, wanted)
    adapters: list[PlannedAdapter] = []
    for module in survey.modules:
        if module.path in wanted:
            if len(module.places) > 1:
                raise ValueError(
                    f"{module.path!r} is one module in several places ({', '.join(module.places)}): an adapter would "
                    "take one of them, and miss the others. Leave it out of target_modules, or give each its own."
                )
            if module.is_read and module.kind != "embedding":
                raise ValueError(
                    f"target_modules matches {module.path!r}, whose weight {survey.class_name} reads without calling "
                    "the module, so that an adapter would do nothing. Leave it out of target_modules."
                )
            _check_looked_up_here(module, survey)
            adapters.extend(_adapters(module, config))
    if not adapters:
        narrowed = [
            f" with {name}={value!r}"
            for name in ("layers_to_transform", "layers_pattern", "exclude_modules")
            if (value := getattr(config, name)) is not None
        ]
        option = "target_modules" if config.resolved_targets is None else "resolved_targets"
        asked = getattr(config, option)
        names = sorted(asked) if isinstance(asked, (set, list)) else asked
        guess = "" if asked is None else meant(asked, (module.path for module in survey.modules))
        there = _layers(survey, config) or layers_there_are(survey)
        raise ValueError(
            f"{option}={names}{','.join(narrowed)} matches no linear layer, convolution or embedding of "
            f"{survey.class_name} outside what is trained as a whole{guess}. {there}"
        )
    embedding = _embedding_adapter(survey, config) if config.embeddings == "lora" else None
    if embedding is not None and embedding not in adapters and not under(embedding.path, extra):
        adapters.append(embedding)
    adapters.extend(_trained_rows(survey, config, extra, {adapter.path for adapter in adapters}))
    for tensor in survey.tensors:
        shared = [a.path for a in adapters if a.weight in tensor.aliases]
        if shared and len(tensor.holders) > 1 and not tensor.tied_head:
            raise ValueError(
                f"{shared[0]!r} shares its weight ({', '.join(tensor.aliases)}): an adapter on one place would change "
                "the other, or miss it. Leave it out of target_modules."
            )
    return _with_tied_head(adapters, survey), targets._replace(paths=wanted)


def _wanted(survey: Survey, config: LottaLoraConfig, extra: set[str]) -> tuple[Targets, set[str]]:
    """What was chosen, and what is to carry an adapter: with the head, without what is trained as a whole."""
    targets = choose_targets(survey, config, extra)
    paths, adapted_head = set(targets.paths), config.head in ADAPTED_HEADS
    if config.resolved_targets is None and adapted_head:
        old = written_by_0_1(config)
        refused = next((m for m in survey.modules if m.in_head and m.reason and not under(m.path, extra)), None)
        if refused is not None and not old:
            raise ValueError(
                f"head={config.head!r}: no adapter goes on {refused.path!r}, a {refused.type_name} whose forward "
                f"{refused.reason}. Pass head='train', or name it in modules_to_save."
            )
        paths |= {m.path for m in survey.modules if m.in_head and m.kind in ("linear", "linear" if old else "conv")}
    paths -= {f"{m.path}.out_proj" for m in survey.modules if m.kind == "projection" and m.path in paths}
    whole = {m.path for m in survey.modules if under(m.path, extra) or (m.in_head and not adapted_head)}
    return targets, paths - whole


def _check_resolved(survey: Survey, config: LottaLoraConfig, extra: set[str], wanted: set[str]) -> None:
    anew = copy.copy(config)
    anew.resolved_targets = None
    if differing := sorted(_wanted(survey, anew, extra)[1] ^ wanted):
        raise ValueError(
            "resolved_targets and the options that choose layers (target_modules, exclude_modules, "
            f"layers_to_transform, layers_pattern, head) disagree on {len(differing)} layers, such as "
            f"{differing[0]!r}. A config that was read from an artifact has both: leave the others as they were, or "
            "choose anew with dataclasses.replace(config, resolved_targets=None)."
        )


def _with_tied_head(adapters: list[PlannedAdapter], survey: Survey) -> list[PlannedAdapter]:
    """A head that is tied to an adapted token embedding shares its adapter."""
    embedding = next((a for a in adapters if a.path == survey.input_embeddings), None)
    if embedding is None or survey.tied_tensor is None:
        return adapters
    head = next((m for m in survey.modules if m.path == survey.output_embeddings), None)
    if head is not None and head.reason:
        raise ValueError(
            f"The adapter of {embedding.path!r} would adapt the tied head {head.path!r} too, but it is a "
            f"{head.type_name}{_whose_forward(head)}. Pass embeddings='train' or 'frozen'."
        )
    path = str(survey.output_embeddings)
    return [*(a for a in adapters if a.path != path), replace(embedding, path=path, kind="tied_head")]


def _embedding_adapter(survey: Survey, config: LottaLoraConfig) -> PlannedAdapter | None:
    """The adapter of the token embedding, None where that is smaller than its adapter.

    Other tables are not adapted: some architectures read a position table's weight past its module's forward.
    """
    module = next((m for m in survey.modules if m.path == survey.input_embeddings), None)
    if module is None or module.kind != "embedding":
        found = f"{survey.class_name} names none"
        if module is not None and module.reason:
            found = f"{module.path!r} is an {module.type_name}{_whose_forward(module)}"
        raise ValueError(
            f"embeddings='lora' needs a token embedding that looks up ids, and {found}. Pass "
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
    tied = [m for m in survey.modules if f"{m.path}.weight" in users]
    read = next((m.path for m in tied if m.is_read), None)
    if read is not None:
        raise ValueError(
            f"An adapter on {module.path!r} is not supported: code of {survey.class_name} reads the table of {read!r} "
            "without calling it, and would miss the adapter. Pass embeddings='train' or 'frozen', and leave it out of "
            "target_modules and trainable_token_indices."
        )
    others = [place for m in tied if m.kind == "embedding" or len(m.places) > 1 for place in m.places]
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
            if module.kind != "embedding":
                raise ValueError(
                    f"{where}, a {module.type_name}{_whose_forward(module)}. Rows are trained of an "
                    "nn.Embedding that looks ids up; a head that is tied to it follows."
                )
            if whole or module.path in adapted:
                what = "modules_to_save trains as a whole" if whole else "carries an adapter"
                raise ValueError(f"{where}, which {what}. Drop one of the two.")
            _check_looked_up_here(module, survey)
            table = next(t for t in survey.tensors if f"{module.path}.weight" in t.aliases)
            wrong = [i for i in ids if i >= module.in_features or i == table.zero_row]
            if wrong:
                padding = "" if table.zero_row is None else f" of which {table.zero_row} is padding"
                raise ValueError(f"{where}, which has {module.in_features} rows{padding}, got {wrong}.")
            sizes = (module.in_features, module.out_features, len(ids), 1.0)
            yield PlannedAdapter(module.path, "rows", *sizes, rows=tuple(sorted(ids)))


def _layers(survey: Survey, config: LottaLoraConfig) -> str:
    """Which layers there are, if `layers_to_transform` names none of them."""
    given = config.layers_to_transform
    wanted = {given} if isinstance(given, int) else set(given or ())
    numbers = {int(number) for module in survey.modules for number in re.findall(r"(?:^|\.)(\d+)\.", module.path)}
    if not wanted or not numbers or numbers & wanted:
        return ""
    return f"Its layers have the numbers {min(numbers)} to {max(numbers)}."


def _adapter(module: SurveyedModule, config: LottaLoraConfig) -> PlannedAdapter:
    if module.kind == "other":
        part = module.type_name == "NonDynamicallyQuantizableLinear"
        hint = "it is part of an nn.MultiheadAttention: name that" if part else "leave it out of target_modules"
        raise ValueError(
            f"target_modules matches {module.path!r}, a {module.type_name}{_whose_forward(module)}. Adapters go on "
            "nn.Linear, Conv1D, nn.Conv1d, 2d, 3d, nn.Embedding and nn.MultiheadAttention, not on classes that compute "
            f"something else; {hint}."
        )
    rank: int = by_pattern(config, "rank_pattern", module.path, config.r)
    alpha: float = by_pattern(config, "alpha_pattern", module.path, config.lora_alpha)
    scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
    if rank % module.groups:
        raise ValueError(
            f"{module.path!r} is a convolution with groups={module.groups}: its rank must be a multiple of that, got "
            f"r={rank}. Pass rank_pattern for it, or leave it out of target_modules."
        )
    if config.adapter != "lora" and (module.kind == "embedding" or (module.groups > 1 and config.adapter != "nola")):
        what = "an embedding" if module.kind == "embedding" else f"a convolution with groups={module.groups}"
        raise ValueError(
            f"adapter={config.adapter!r} is not supported on {what}, and {module.path!r} is one. Leave it out of "
            "target_modules, or use adapter='lora'."
        )
    side = max(module.out_features, module.in_features * math.prod(module.kernel))
    if config.adapter == "randlora" and side > SIDE:
        raise ValueError(
            f"adapter='randlora' takes rows and columns of bases that have {SIDE:,} of each, and {module.path!r} has "
            f"{side:,} inputs or outputs. Leave it out of target_modules, or use adapter='lora'."
        )
    if module.kind == "conv" and module.own_forward and (config.residual or config.lora_dropout):
        raise ValueError(
            f"{'residual' if config.residual else 'lora_dropout'} is not supported on convolutions with a forward of "
            f"their own, and {module.path!r}, a {module.type_name}, is one."
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
    options = (beta, dora, config.layer_norm, config.residual)
    adapter = PlannedAdapter(
        module.path,
        kind,
        *sizes,
        *options,
        own_forward=module.own_forward,
        bias=config.lora_bias,
        source=config.adapter,
        bases=config.bases or 0,
    )
    largest = max(map(math.prod, adapter.shapes.values()))
    if largest > _LARGEST:
        option = "rank_pattern" if rank != config.r else "r"
        raise ValueError(
            f"{option}: rank {rank} over {module.path!r} would make a tensor of {largest:,} elements, more than "
            f"{_LARGEST:,}. No rank above {min(module.in_features, module.out_features)} adds anything there."
        )
    return adapter


def _whose_forward(module: SurveyedModule) -> str:
    return f", whose forward {module.reason}" if module.reason else ""


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
