"""`LottaLoraModel`: PEFT's LoRA tuner over a backbone that is drawn from a seed."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import TaskType
from torch import nn

from ..artifact.architecture import check_architecture
from ..artifact.manifest import check_content, check_kept, check_scaffold
from ..config import LottaLoraConfig
from ..layers.adapter_tensor import DECAYED, UNDECAYED
from ..layers.attention import unfuse
from ..layers.layer import ScaffoldLayer
from ..layers.rows import TrainedRows
from ..layers.switches import Switches
from ..layers.walk import outside_adapters
from ..paths import owner_of
from ..plan.initialization import PrivateRandomness
from ..plan.plan import PREFIX, Plan
from ..plan.planner import plan_from_survey, warn_of_losses
from ..plan.survey import Survey, survey_model, with_model_dtypes
from ..recorded import DefaultTargets
from .base_model import BaseTensors, check_loadable, materialise
from .merging import Merging
from .mixing import Mixing
from .placing import Placing, as_planned
from .progress import progress
from .reseed import SeedSwitching
from .saving import Saving
from .second_adapter import check_second_adapter
from .switching import Switching
from .trained import TrainedTensors
from .zero_init import StandIns, stand_ins


class _Handled(list[str]):
    """`modules_to_save` that PEFT lists but does not act on: the plan has made these modules trained already."""

    def __bool__(self) -> bool:
        return False


class _HandledTokens(dict[str, list[int]]):
    """`trainable_token_indices` that PEFT finds empty, and so neither wraps an embedding nor saves one as a whole."""

    def __init__(self, given: Any = None) -> None:
        super().__init__()
        self.given = given


class LottaLoraModel(Placing, Switching, Saving, SeedSwitching, Merging, lora.LoraModel):  # type: ignore[misc]
    """The tuner that `get_peft_model(model, LottaLoraConfig(...))` puts around a model.

    Everything is planned and validated first; then the scaffold is drawn, once, and adapters are injected. Its public
    methods are reachable from the `PeftModel`.

    Attributes:
        survey: the base model's tensors, before anything was changed.
        trained: the adapters' copies of trained base tensors.
    """

    tuner_layer_cls = ScaffoldLayer
    uses_shared_state = True  # the survey and trained tensors: PEFT then refuses inject_adapter_in_model

    survey: Survey | None
    trained: TrainedTensors
    first_config: LottaLoraConfig
    first_plan: Plan

    # ---- building -------------------------------------------------------------------------------------------------

    def _pre_injection_hook(self, model: nn.Module, config: LottaLoraConfig, adapter_name: str) -> None:
        self.survey = None
        self.trained = TrainedTensors()
        self.base = BaseTensors(model, self.trained)
        self.mixing = Mixing(model, self.trained)
        self.switches = Switches()
        self._layers_disabled = False
        self._unfused: list[tuple[nn.Module, str, Any]] = []
        self._frozen: list[torch.Tensor] = []  # while layers are disabled: what was not trained before
        self.plans: dict[str, Plan] = {}

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Plan, validate, draw, then let PEFT inject the adapters.

        With the very config object of an adapter that is there, as TRL makes the reference of DPO, a copy of it. TRL
        copies what has the adapter's name; trained tensors have the base model's.

        Raises:
            ValueError: the plan is impossible, or another scaffold than the model's is asked for, or a context is open
                that restores it. The model is then as it was.
        """
        if state_dict is not None:
            raise ValueError(
                "LottaLoRA adapters are placed by their config; injecting by a state_dict is not supported."
            )
        config = self.peft_config[adapter_name]
        _check_adapter_name(adapter_name, model, self.plans)
        first = self.survey is None
        if self._switched:
            raise ValueError(
                f"Within scaffold_seed or scaffold_off adapter {adapter_name!r} cannot be added: at their end the "
                "model has its own scaffold again, and the adapter would not have that of its seed. Add or load it "
                "outside, and train it over another scaffold within."
            )
        if first and any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise ValueError(
                "The base model already carries adapters, whose scaffold would be drawn over. Call unload() on the "
                "PeftModel first, or use add_adapter on it."
            )
        if first:
            with stand_ins(model) as partitioned:
                survey, plan = self._planned(model, adapter_name, config, partitioned)
        else:
            survey, plan = self._planned(model, adapter_name, config)

        start = not (config._values_follow or low_cpu_mem_usage or _weights_follow())  # else a file has the values
        same = (
            name for name, other in self.plans.items() if self.peft_config[name] is config and plan.trains_as(other)
        )
        copied = next(same, None) if start else None

        if config.frozen_by_file:
            warnings.warn(
                f"Adapter {adapter_name!r} will not be trained: its config was read from an artifact, which says "
                "inference_mode=True. To train a new adapter with it, set config.inference_mode = False first; to go "
                "on with the artifact's, PeftModel.from_pretrained(model, path, is_trainable=True).",
                UserWarning,
                stacklevel=2,
            )

        # From here on the model changes.
        if first:
            if config.scaffold_digests is None:  # an artifact that is loaded was made over this base on purpose
                warn_of_losses(plan, config)
            materialise(model, plan, config.residency)
            for tensor in plan.tensors if config.padding_rows is not None else ():
                owner, _ = owner_of(model, tensor.path)
                if isinstance(owner, nn.Embedding):  # config.json may have built another, whose row would not learn
                    owner.padding_idx = tensor.survey.zero_row
            self.residency = config.residency
            self.survey = survey
            self.first_config, self.first_plan = config, plan
        config._plan = self.plans[adapter_name] = plan
        # Also where it is None: PEFT's task classes would fill it later, and wrap the head once more.
        config.modules_to_save = _Handled(dict.fromkeys(_as_list(config.modules_to_save)))
        # Not where no embedding takes part: PEFT asks for the token embedding then, which not every architecture names.
        if config.token_indices is not None or any(adapter.kind == "embedding" for adapter in plan.adapters):
            config.trainable_token_indices = _HandledTokens(config.token_indices)
        config._values_follow = False  # the config may be used for another model
        self.trained.add(model, adapter_name, plan, start)
        if config.target_modules is None:
            config.target_modules = DefaultTargets(plan.targets)
        with (
            as_planned(config, plan),
            self._switching(),
            PrivateRandomness(),
        ):  # nn.Linear's constructor draws, though its values are not used
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
        self._finish_adapters(model, adapter_name, plan, config, start)
        self.switches.trained |= {adapter_name} if self.trained.planned[adapter_name] else set()
        self._unfused.extend(unfuse(model))
        self.mixing.found.clear()
        if copied is not None:
            for mine, its in zip(self._parameters_of(adapter_name), self._parameters_of(copied), strict=True):
                mine.data = its.data.clone()  # also its dtype
        self._set_trained_grad([adapter_name], adapter_name in self.active_adapters and not config.inference_mode)

    def _planned(
        self, model: nn.Module, adapter_name: str, config: LottaLoraConfig, partitioned: StandIns | None = None
    ) -> tuple[Survey, Plan]:
        """What is going to be done, checked. Changes nothing."""
        survey = survey_model(model) if self.survey is None else with_model_dtypes(self.survey, model)
        plan = plan_from_survey(survey, config)
        if self.survey is not None:
            self.base.check_shapes(self.first_plan)
            self.trained.check_addable(model, plan)
            check_second_adapter(adapter_name, plan, config, self.first_plan, self.first_config)
            if plan.scaffold == self.first_plan.scaffold:
                known = self.first_plan.scaffold_digests()
                if plan.bases != self.first_plan.bases:
                    known = {spec.name: known[spec.name] for spec in plan.scaffold.values()}
                plan = replace(plan, digests=known)
        _check_rows(adapter_name, plan, model)
        if partitioned is not None:
            partitioned.settle(model, plan, config.use_dora)
        check_loadable(model, plan)
        _check_task(model, config)
        plan.kept_digests.update(self.base.kept_digests(plan))
        if config.scaffold_digests is not None:
            check_scaffold(plan, plan.seed, config.scaffold_digests, config.kept_digests or {}, "The artifact")
        check_architecture(config._artifact_manifest or {}, config._artifact_architecture, model)
        if config._artifact_shapes is not None and config._artifact_manifest is not None:
            check_content(plan, config._artifact_manifest, config._artifact_shapes, "The artifact")
        return survey, plan

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Module:
        """Refused, unless the vocabulary has that size: its tensors are planned, and drawn, adapted or trained.

        Raises:
            ValueError: the size is another one.
        """
        embeddings: Any = self.model.get_input_embeddings()  # type: ignore[operator]
        size = len(embeddings.weight)
        padding = kwargs.get("pad_to_multiple_of", args[0] if args else None) or 1
        wanted = -(-(new_num_tokens or size) // padding) * padding
        if wanted != size:
            raise ValueError(
                f"The vocabulary has {size} entries and cannot become {wanted} under a LottaLoRA adapter. Call "
                "resize_token_embeddings on the base model before get_peft_model, or, when training is over, on what "
                "merge_and_unload() returns."
            )
        return embeddings

    # ---- looking --------------------------------------------------------------------------------------------------

    def get_plan(self, adapter_name: str | None = None) -> Plan:
        """The plan of an adapter (default: the first active one); printing it shows roles, sizes and shares.

        Raises:
            ValueError: there is no such adapter.
        """
        name = self._known(adapter_name)
        plan, save_dtype = self.plans[name], self.peft_config[name].save_dtype
        return plan if plan.save_dtype == save_dtype else replace(plan, save_dtype=save_dtype)  # set since

    def get_betas(self, adapter_name: str | None = None) -> dict[str, float]:
        """The beta of each adapted layer by module path.

        Raises:
            ValueError: there is no such adapter.
        """
        name = self._known(adapter_name)
        return {
            path: layer.lora_beta[name].value.item()
            for path, layer in self.model.named_modules()
            if isinstance(layer, ScaffoldLayer) and name in layer.lora_beta
        }

    def _known(self, adapter_name: str | None) -> str:
        name = adapter_name or self.active_adapters[0]
        if name not in self.plans:
            raise ValueError(f"There is no adapter {name!r}. There are {sorted(self.plans)}.")
        return name

    def verify_scaffold(self, full: bool = False) -> None:
        """Compare the live scaffold, in its dtype, with what the seed draws. Without a scaffold there is nothing to do.

        Args:
            full: every weight; otherwise 66 runs of 64 weights of each tensor. Families that need a whole matrix
                (orthogonal, spectral_radius) are always compared whole, to rounding. Of an artifact over a pretrained
                base also every byte that was kept of that, which loading compares by such runs, in bfloat16.

        Raises:
            ValueError: a weight differs; the first such tensor is named. Also where adapters are merged into it, and
                within `scaffold_off`; within `scaffold_seed` it is that seed which counts.
        """
        scaffold = self.get_plan().scaffold
        with progress("Verifying the scaffold", sum(spec.numel for spec in scaffold.values())) as done:
            for path, spec in scaffold.items():
                self.base.verify(path, spec, full)
                done(spec.numel)
        name = self._known(None)
        if full:
            check_kept(self.peft_config[name]._artifact_manifest or {}, self.base.kept(self.plans[name]))

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Read by DistributedDataParallel: every rank draws its own scaffold, so none is broadcast."""
        drawn = {id(getattr(*owner_of(self.model, path))) for path in self.get_plan().scaffold}
        named = self.model.named_parameters(remove_duplicate=False)
        return [PREFIX + name for name, parameter in named if id(parameter) in drawn]


def _check_adapter_name(adapter_name: str, model: nn.Module, adapters: Iterable[str]) -> None:
    # PEFT takes an adapter's name out of keys by matching path segments.
    segments = {UNDECAYED, DECAYED}
    for path, module in outside_adapters(model):
        segments.update(path.split("."), module._modules, module._parameters, module._buffers)
    if adapter_name in segments - {"default", *adapters}:
        raise ValueError(
            f"An adapter cannot be called {adapter_name!r}: the model has a module or parameter of that name, and the "
            "two could not be told apart in a saved file. Choose another adapter_name."
        )


def _check_rows(adapter_name: str, plan: Plan, model: nn.Module) -> None:
    for adapter in plan.adapters:
        layer = model.get_submodule(adapter.path) if adapter.kind in ("embedding", "rows") else None
        if isinstance(layer, ScaffoldLayer) and isinstance(layer, TrainedRows) != (adapter.kind == "rows"):
            raise ValueError(
                f"Adapter {adapter_name!r} cannot be added: of {adapter.path!r} one adapter trains some rows, and the "
                "other is low-rank. Build a second model."
            )


def _check_task(model: nn.Module, config: LottaLoraConfig) -> None:
    # PEFT's classes for these tasks ask for this method only after the adapters are in.
    if config.task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM") and not hasattr(model, "prepare_inputs_for_generation"):
        task = TaskType(config.task_type).value
        raise ValueError(
            f"task_type={task!r} is for models that generate, and {type(model).__name__} has no "
            "prepare_inputs_for_generation. Pass the model's own task_type, or None."
        )


def _weights_follow() -> bool:
    """Whether PEFT's low_cpu_mem_usage is on: parameters are made on the meta device, since a file has the values."""
    module = nn.Module()
    module.register_parameter("probe", nn.Parameter(torch.empty(0)))
    return bool(module.probe.is_meta)  # type: ignore[union-attr]


def _as_list(names: list[str] | None) -> list[str]:
    return [] if names is None else list(names)  # "or []" would drop a _Handled list


def tuner_of(model: nn.Module) -> LottaLoraModel:
    """The LottaLoRA tuner of a `PeftModel`, also one that DDP has wrapped.

    Raises:
        ValueError: it has none.
    """
    return LottaLoraModel._tuner_of(model)
