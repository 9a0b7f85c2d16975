"""Makes the plan: each tensor's one role, the adapters, and every check possible before the model is touched."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from dataclasses import replace

import torch
from peft.utils.other import get_pattern_key
from torch import nn

from ..config import LottaLoraConfig
from ..scaffold.families import get_family
from ..scaffold.matrix_families import TRANSFORMS
from ..scaffold.scales import scale_of
from ..scaffold.tensor import ScaffoldTensor
from .adapter_planner import ADAPTED_HEADS, plan_adapters
from .canonical import first_change, read_back
from .names import near
from .patterns import by_pattern, parents, under
from .plan import Plan, PlannedAdapter, PlannedTensor, Role
from .survey import Survey, SurveyedTensor, survey_model
from .targets import check_choice, written_by_0_1
from .targets_0_1 import with_heads_of_0_1

# PEFT's task classes append these to modules_to_save whether the model has them or not.
_PEFT_HEADS = {"classifier", "score", "qa_outputs"}


def make_plan(model: nn.Module, config: LottaLoraConfig) -> Plan:
    """What `get_peft_model(model, config)` would do, without doing it.

    Raises:
        TypeError: not a module.
        ValueError: a combination that cannot work; see `plan_from_survey`.

    Example:
        >>> import torch
        >>> from hf_lottalora import LottaLoraConfig, make_plan
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> config = LottaLoraConfig(seed=42, r=2, target_modules=["0"], modules_to_save=["2"])
        >>> make_plan(model, config).adapter_parameters
        65
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"make_plan takes a model, got a {type(model).__name__}. Built within accelerate's init_empty_weights, a "
            "model costs no memory."
        )
    if not isinstance(config, LottaLoraConfig):
        raise TypeError(f"make_plan takes a LottaLoraConfig, got a {type(config).__name__}.")
    return plan_from_survey(survey_model(model), copy.copy(config))


def plan_from_survey(survey: Survey, config: LottaLoraConfig, again: bool = False) -> Plan:
    """Give each tensor its one role; `again` where a plan was made from all of it, but for the seed: without warnings.

    Raises:
        ValueError: no module matches the targets, a target is of an unsupported type, options disagree on a tied
            tensor, a name in `modules_to_save` is not there, or the weights are quantised.
    """
    config.check()
    if survey.inner_heads and written_by_0_1(config):
        survey = with_heads_of_0_1(survey)
    if (rows := config.padding_rows) is not None:
        as_drawn = [(t, rows.get(t.name)) for t in survey.tensors]
        tensors_as_drawn = (t if t.zero_row == row else replace(t, zero_row=row) for t, row in as_drawn)
        survey = replace(survey, tensors=tuple(tensors_as_drawn))
    extra = _modules_to_save(survey, config)
    _check_tied_options(survey, config, extra)
    adapters, targets = plan_adapters(survey, config, extra)
    adapted = {adapter.weight: adapter for adapter in adapters if adapter.kind != "tied_head"}
    planned = [_plan_tensor(tensor, survey, config, extra, adapted) for tensor in survey.tensors]
    _check_biases(planned, adapters)
    tensors = tuple(_with_norm_of_direction(tensor, planned) for tensor in planned)
    seed, paths, options = int(config.seed or 0), tuple(sorted(targets.paths)), config.decisive_options()
    left_out, save_dtype = targets.left_out, config.save_dtype
    bases = None
    if config.adapter != "lora":
        assert config.basis_family is not None
        name = f"{config.adapter}.bases"
        bases = ScaffoldTensor(name, (1 << 20, 1 << 20), config.effective_adapter_seed, config.basis_family)
    plan = Plan(survey, tensors, tuple(adapters), seed, paths, targets.rule, left_out, options, save_dtype, bases)
    _check_patterns(plan, config)
    if not again:
        check_choice(survey, config, targets)
    return plan


def _plan_tensor(
    tensor: SurveyedTensor,
    survey: Survey,
    config: LottaLoraConfig,
    extra: set[str],
    adapted: Mapping[str, PlannedAdapter],
) -> PlannedTensor:
    role = _role(tensor, config, extra, adapted)
    if role == "scaffold":
        if not tensor.dtype.is_floating_point:
            raise ValueError(
                f"{tensor.path!r} has dtype {tensor.dtype}: a quantised weight cannot be drawn over. Load the model "
                "without quantisation (a scaffold needs no stored weights), or pass redraw='none'."
            )
        spec = _scaffold_spec(tensor, survey, config)
        return PlannedTensor(tensor, _checked_role(tensor, role), spec, None, saved=False)
    base = _own_init(tensor, survey, config.seed or 0) if config.redraw == "all" else None
    start = _own_init(tensor, survey, config.effective_adapter_seed) if config.redraw == "all" else None
    saved = role == "trained" or config.redraw == "all" or config.save_kept
    return PlannedTensor(tensor, _checked_role(tensor, role, saved), base, start, saved)


def _checked_role(tensor: SurveyedTensor, role: Role, saved: bool = False) -> Role:
    """The role, if the tensor can have it: one that something else holds can only be kept, where it is; one that a
    forward pass writes into is neither what a seed draws nor what it was.
    """
    if tensor.written and role != "trained" and not saved:
        wanted = "drawn: it would not stay what the seed draws" if role == "scaffold" else "kept out of the artifact"
        raise ValueError(
            f"{tensor.path!r} is a weight under max_norm, whose forward writes into it, so it cannot be {wanted}. "
            "Train it whole: embeddings='train', or name it in modules_to_save; or build the model without max_norm."
        )
    if tensor.held is None or (role == "kept" and not saved):
        return role
    loaded = "Load the model in memory without quantisation, or"
    what = {
        "scaffold": f"drawn over. {loaded} pass redraw='none'.",
        "trained": f"trained. {loaded} freeze it: embeddings='frozen', norms='frozen', head='lora'.",
        "kept": f"saved. {loaded} leave save_kept=False, with redraw='none'.",
    }[role]
    raise ValueError(f"{tensor.path!r} is {tensor.held}, and cannot be {what}")


def _with_norm_of_direction(tensor: PlannedTensor, planned: list[PlannedTensor]) -> PlannedTensor:
    """Weight norm holds a matrix as size g and direction v: where v is drawn, g is its norm, so that it is the draw."""
    parent, _, attribute = tensor.path.rpartition(".")
    direction = next((t for t in planned if t.path == f"{parent}.original1"), None)
    if attribute != "original0" or direction is None or not isinstance(direction.base, ScaffoldTensor):
        return tensor
    v, size = direction.base.draw(), tensor.survey.shape
    norm = torch.linalg.vector_norm(v, dim=[i for i in range(v.dim()) if size[i] == 1], keepdim=True)
    return replace(tensor, base=norm, start=norm, survey=replace(tensor.survey, arbitrary=False))


def _role(
    tensor: SurveyedTensor, config: LottaLoraConfig, extra: set[str], adapted: Mapping[str, PlannedAdapter]
) -> Role:
    if tensor.kind == "buffer":
        return "kept"
    if tensor.path.rpartition(".")[2] == "bias" and (
        config.bias == "all" or (config.bias == "lora_only" and f"{tensor.path.removesuffix('bias')}weight" in adapted)
    ):
        return "trained"
    if under(tensor.path, extra) or any(under(alias, extra) for alias in tensor.aliases):
        return "trained"
    drawn: Role = "scaffold"
    if config.redraw == "none" or (config.redraw == "targets" and tensor.path not in adapted):
        drawn = "kept"
    if tensor.kind == "embedding" or (tensor.kind == "parameter" and not tensor.in_head):
        if not tensor.init.random:
            return "kept"
        if tensor.path not in adapted and config.embeddings != "frozen":
            return "trained"  # with "lora": too small for an adapter, or not a module that can carry one
        return drawn if config.redraw != "targets" else "kept"
    if tensor.in_head and (config.head not in ADAPTED_HEADS or (config.head == "lora_bias" and tensor.kind == "bias")):
        return "trained"
    if tensor.kind == "norm":
        return "trained" if config.norms == "train" else "kept"
    if tensor.kind == "bias":
        return "trained" if config.biases == "train" else "kept"
    if tensor.kind == "parameter":
        return "trained" if tensor.init.random else "kept"
    # A matrix. One that the architecture itself sets to a constant means something and is left alone.
    return drawn if tensor.init.random else "kept"


def _check_biases(planned: list[PlannedTensor], adapters: list[PlannedAdapter]) -> None:
    """Refuse two trained biases that would only be added, and to train one that two adapters would need."""
    roles = {tensor.path: tensor.role for tensor in planned}
    for adapter in adapters:
        if adapter.bias and adapter.kind == "projection" and adapter.biased not in roles:
            raise ValueError(
                f"lora_bias=True needs a bias to add to in an nn.MultiheadAttention, and {adapter.module!r} has none."
            )
        if adapter.bias and roles.get(adapter.biased) == "trained":
            raise ValueError(
                f"lora_bias=True trains a bias of the adapter on {adapter.path!r}, and {adapter.biased!r}, to which "
                "that is added, is too. Train one: drop lora_bias, or bias, biases='train', head='lora_bias' or "
                "the entry in modules_to_save."
            )


def _check_patterns(plan: Plan, config: LottaLoraConfig) -> None:
    """Refuse a key that does nothing."""
    drawn = [path.rpartition(".")[0] for path in plan.scaffold]
    adapted = [adapter.module for adapter in plan.adapters if not adapter.rows]
    for name, paths in (("family_pattern", drawn), ("seed_pattern", drawn), ("train_beta_pattern", adapted)):
        for key in getattr(config, name):
            if not any(get_pattern_key([key], path) == key for path in paths):
                what = "adapted" if name == "train_beta_pattern" else "drawn"
                raise ValueError(
                    f"{name} has the key {key!r}, which matches no {what} module{near(key, paths)}. See "
                    "print(make_plan(...))."
                )


def _scaffold_spec(tensor: SurveyedTensor, survey: Survey, config: LottaLoraConfig) -> ScaffoldTensor:
    matrix = tensor.kind == "matrix"
    module = tensor.path.rpartition(".")[0]
    family = by_pattern(config, "family_pattern", module, config.family)
    rule = config.scale if matrix and config.scale is not None else "initializer_range"
    own = get_family(family).scale_rule
    general = get_family(config.family).scale_rule
    if matrix and family != config.family and (rule == general or (own == "gain") != (general == "gain")):
        rule = own  # a gain is no standard deviation
    if family == "zero" and tensor.path.endswith(".original1"):
        raise ValueError(f"{tensor.path!r} is a direction under weight norm, which family='zero' cannot make.")
    scale = scale_of(rule, tensor.fan_in, tensor.fan_out, survey.initializer_range)
    if scale is None and tensor.kind == "embedding":
        scale = 1.0  # torch's own init of nn.Embedding is N(0, 1)
    if scale is None:
        raise ValueError(
            f"A plain nn.Module has no initializer_range to scale {tensor.path!r} by. Pass scale='fan_in' or a number."
        )
    # A look-up table has no spectrum, and a scaffold that is switched off still needs something to read.
    family = family if matrix or family not in ("zero", *TRANSFORMS) else "normal"
    seed = (int(config.seed or 0) + by_pattern(config, "seed_pattern", module, 0)) % 2**64
    return ScaffoldTensor(tensor.name, tensor.shape, seed, family, scale, tensor.zero_row, tensor.stacked)


def _own_init(tensor: SurveyedTensor, survey: Survey, seed: int) -> ScaffoldTensor | torch.Tensor | None:
    """The architecture's own start: its constant, or for what it makes random our stream in its size."""
    if not tensor.init.random:
        return tensor.init.value
    if survey.initializer_range is not None:
        if tensor.kind == "bias":  # random biases are special (Mamba's time step): as the architecture makes them
            return tensor.init.value
        return ScaffoldTensor(tensor.name, tensor.shape, seed, "normal", survey.initializer_range, tensor.zero_row)
    if tensor.kind == "embedding":  # torch's own init of nn.Embedding is N(0, 1)
        return ScaffoldTensor(tensor.name, tensor.shape, seed, "normal", 1.0, tensor.zero_row)
    if tensor.kind in ("matrix", "bias") and tensor.fan_in:  # torch's own is U(-1/sqrt(fan_in), 1/sqrt(fan_in))
        return ScaffoldTensor(tensor.name, tensor.shape, seed, "uniform", 1 / math.sqrt(3 * tensor.fan_in))
    return tensor.init.value


def _modules_to_save(survey: Survey, config: LottaLoraConfig) -> set[str]:
    """Paths of the modules, or single parameters, that `config.modules_to_save` means: a full path, or its end."""
    found = set()
    paths = {path for t in survey.tensors for alias in t.aliases for path in (alias, *parents(alias))}
    if isinstance(config.modules_to_save, str):
        raise ValueError(f"modules_to_save must be a list of module names, got the string {config.modules_to_save!r}.")
    # Not "or []": a list that was handed on to PEFT is falsy, see model._Handled.
    for name in dict.fromkeys(() if config.modules_to_save is None else config.modules_to_save):
        if name in _PEFT_HEADS and config.head in ADAPTED_HEADS:
            continue  # appended by PEFT's task class, but the config wants an adapter there
        matches = {path for path in paths if path == name or path.endswith(f".{name}")}
        if not matches and name not in _PEFT_HEADS:
            raise ValueError(
                f"modules_to_save names {name!r}, but {survey.class_name} has no such module or parameter"
                f"{near(name, paths)}."
            )
        found |= matches
    return found


def _check_tied_options(survey: Survey, config: LottaLoraConfig, extra: set[str]) -> None:
    tied = survey.tied_tensor
    if tied is None:
        return
    if any(under(alias, extra) for alias in tied.aliases) and config.embeddings != "train":
        raise ValueError(
            f"modules_to_save trains {tied.path!r}, which is tied to {list(tied.aliases)}, but embeddings="
            f"{config.embeddings!r} says otherwise. Drop one of the two."
        )
    if config.head is not None and config.head != config.embeddings:
        raise ValueError(
            f"The head of {survey.class_name} is tied to its input embeddings ({', '.join(tied.aliases)}), but head="
            f"{config.head!r} and embeddings={config.embeddings!r} disagree. Leave head=None, it follows embeddings."
        )


def warn_of_losses(plan: Plan, config: LottaLoraConfig) -> None:
    """Say once what a user may not expect: loaded weights are drawn over, or values are nobody's to make again."""
    redraw, architecture = config.redraw, plan.survey.architecture
    if architecture is not None and (change := first_change(read_back(architecture), architecture)):
        key, back, given = change
        warnings.warn(
            f"A config.json cannot hold {key}={given!r} of this {type(architecture).__name__}: it comes back as "
            f"{back!r}. The artifact will load over a base model that is built as this one was "
            "(PeftModel.from_pretrained), but our Auto classes would build another. Set it to a value that comes back.",
            UserWarning,
            stacklevel=2,
        )
    arbitrary = [tensor.path for tensor in plan.with_role("kept") if tensor.survey.arbitrary and redraw == "all"]
    if arbitrary:
        warnings.warn(
            f"{', '.join(arbitrary)} keep the values that {plan.survey.class_name} was built with, since nothing of it "
            "says how to initialise them: they are saved in the artifact, but another process gets others for the same "
            "seed. Give the module that owns them a reset_parameters method.",
            UserWarning,
            stacklevel=2,
        )
    unsaved = [tensor for tensor in plan.with_role("kept") if not tensor.saved]
    if unsaved and not plan.survey.pretrained_from and plan.survey.architecture is not None:
        warnings.warn(
            f"redraw={redraw!r} keeps {len(unsaved)} tensors of a base model that was not loaded from anywhere, and "
            "the artifact will not contain them: it loads over this very base model only. Pass save_kept=True to save "
            "them, or redraw='all' to draw everything from the seed.",
            UserWarning,
            stacklevel=2,
        )
    if plan.survey.pretrained_from and redraw != "none" and plan.scaffold:
        keep = "" if redraw == "targets" else "Pass redraw='targets' to replace only the adapted layers, or "
        drawn = [*plan.scaffold, *(t for t in plan.with_role("trained") if isinstance(t.start, ScaffoldTensor))]
        warnings.warn(
            f"redraw={redraw!r} draws over weights that were loaded from {plan.survey.pretrained_from!r}: "
            f"{len(drawn)} tensors become random. {keep or 'Pass '}redraw='none' to keep them all; to train "
            "from a seed, AutoModel.from_config loads nothing.",
            UserWarning,
            stacklevel=2,
        )
