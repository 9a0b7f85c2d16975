"""`LottaLoraModel`: PEFT's LoRA tuner over a backbone that is drawn from a seed."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import TaskType
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from ..artifact.architecture import check_architecture
from ..artifact.manifest import check_scaffold, check_shapes, check_state_dict
from ..config import DefaultTargets, LottaLoraConfig
from ..layers.attention import ScaffoldAttention, unfuse
from ..layers.conv import ScaffoldConv
from ..layers.embedding import ScaffoldEmbedding, TiedHead
from ..layers.layer import DECAYED, UNDECAYED, ScaffoldLayer, Switches
from ..layers.linear import ScaffoldLinear
from ..layers.rows import TrainedRows
from ..paths import clean_modules, owner_of
from ..plan.initialization import PrivateRandomness
from ..plan.plan import MANIFEST_KEY, PREFIX, Plan, saved_key
from ..plan.planner import plan_from_survey, warn_of_losses
from ..plan.survey import Survey, survey_model, with_model_dtypes
from ..residency.foreign import in_memory, is_foreign
from ..residency.forms import VirtualWeight
from ..residency.recipe import recipe_of
from ..scaffold.interrupts import uninterrupted
from ..scaffold.tensor import ScaffoldTensor
from .base_model import BaseTensors, check_loadable, materialise, other_dtypes
from .merging import Merging
from .progress import progress
from .reseed import SeedSwitching
from .second_adapter import check_second_adapter
from .trained import TrainedTensors


class _Handled(list[str]):
    """`modules_to_save` that PEFT lists but does not act on: the plan has made these modules trained already."""

    def __bool__(self) -> bool:
        return False


class _HandledTokens(dict[str, list[int]]):
    """`trainable_token_indices` that PEFT finds empty, and so neither wraps an embedding nor saves one as a whole."""

    def __init__(self, given: Any = None) -> None:
        super().__init__()
        self.given = given


class _Complete(dict[str, torch.Tensor]):
    """The tensors of an artifact, to which PEFT adds none: embeddings are in it, or drawn from the seed."""

    def update(self, other: Any = (), /, **kwargs: Any) -> None:
        """Warn where PEFT adds an embedding, as for `save_embedding_layers=True` or a resized vocabulary."""
        added = sorted(dict(other, **kwargs).keys() - self.keys())
        if added:
            warnings.warn(
                f"save_embedding_layers adds nothing to a LottaLoRA artifact: {', '.join(added)} is drawn from the "
                "seed, or tied to what is saved.",
                stacklevel=2,
            )


class LottaLoraModel(SeedSwitching, Merging, lora.LoraModel):  # type: ignore[misc]
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
            ValueError: the plan is impossible, or another scaffold than the model's is asked for. The model is then
                as it was.
        """
        if state_dict is not None:
            raise ValueError(
                "LottaLoRA adapters are placed by their config; injecting by a state_dict is not supported."
            )
        config = self.peft_config[adapter_name]
        _check_adapter_name(adapter_name, model, self.plans)
        first = self.survey is None
        if first and any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise ValueError(
                "The base model already carries adapters, whose scaffold would be drawn over. Call unload() on the "
                "PeftModel first, or use add_adapter on it."
            )
        survey = survey_model(model) if self.survey is None else with_model_dtypes(self.survey, model)
        plan = plan_from_survey(survey, config)
        if not first:
            self.base.check_shapes(self.first_plan)
            check_second_adapter(adapter_name, plan, config, self.first_plan, self.first_config)
        _check_rows(adapter_name, plan, model)
        check_loadable(model, plan)
        _check_task(model, config)
        plan.kept_digests.update(self.base.kept_digests(plan))
        if config.scaffold_digests is not None:
            check_scaffold(plan, plan.seed, config.scaffold_digests, config.kept_digests or {}, "The artifact")
        check_architecture(config._artifact_architecture, model)
        if config._artifact_shapes is not None:
            check_shapes(plan, config._artifact_shapes, "The artifact", "Nothing was loaded.")

        start = not (config._values_follow or low_cpu_mem_usage or _weights_follow())  # else a file has the values
        same = (
            name for name, other in self.plans.items() if self.peft_config[name] is config and plan.trains_as(other)
        )
        copied = next(same, None) if start else None

        # From here on the model changes.
        if first:
            if config.scaffold_digests is None:  # an artifact that is loaded was made over this base on purpose
                warn_of_losses(plan, config)
            materialise(model, plan, config.residency)
            self.residency = config.residency
            self.survey = survey
            self.first_config, self.first_plan = config, plan
        config._plan = self.plans[adapter_name] = plan
        # Also where it is None: PEFT's task classes would fill it later, and wrap the head once more.
        config.modules_to_save = _Handled(dict.fromkeys(_as_list(config.modules_to_save)))
        config.trainable_token_indices = _HandledTokens(config.token_indices)
        config._values_follow = False  # the config may be used for another model
        self.trained.add(model, adapter_name, plan, start)
        if config.target_modules is None:
            config.target_modules = DefaultTargets(plan.targets)
        requested = config.target_modules  # PEFT expands "all-linear" and condenses long lists in place
        with self._switching(), PrivateRandomness():  # nn.Linear's constructor draws, though its values are not used
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
        config.target_modules = requested
        self._finish_adapters(model, adapter_name, plan, config, start)
        self.switches.trained |= {adapter_name} if self.trained.planned[adapter_name] else set()
        self._unfused.extend(unfuse(model))
        if copied is not None:
            for mine, its in zip(self._parameters_of(adapter_name), self._parameters_of(copied), strict=True):
                mine.data = its.data.clone()  # also its dtype
        self._set_trained_grad([adapter_name], adapter_name in self.active_adapters and not config.inference_mode)

    @staticmethod
    def _check_target_module_exists(peft_config: LottaLoraConfig, key: str) -> Any:
        plan = peft_config._plan
        if plan is None or any(a.module == key and a.kind != "tied_head" for a in plan.adapters):
            return plan is not None
        matched = check_target_module_exists(peft_config, key)
        return False if matched else matched  # PEFT tells what is excluded from what does not match

    def _check_new_adapter_config(self, config: LottaLoraConfig) -> None:
        """Nothing: of biases that are trained every adapter has its own, of which PEFT has one for all."""

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        """As PEFT's, without its own way with biases: those that an adapter trains are switched with it."""
        super()._mark_only_adapters_as_trainable(model)
        for _, module in clean_modules(model):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)

    def _check_tied_modules(self, model: nn.Module, peft_config: LottaLoraConfig) -> None:
        """Nothing to check or warn about: the plan has, and tied tensors stay one tensor."""

    def _get_tied_target_modules(self, model: nn.Module) -> list[str]:
        return []  # see TiedHead: merging keeps the tie

    @staticmethod
    def _create_new_module(
        lora_config: LottaLoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> nn.Module:
        requantise = {key: kwargs[key] for key in ("get_apply_tensor_subclass",) if key in kwargs}
        kwargs = {key: kwargs[key] for key in ("r", "lora_alpha", "target_name")}
        if isinstance(target, _ConvNd):
            return ScaffoldConv(target, adapter_name, config=lora_config, **kwargs)
        if isinstance(target, nn.MultiheadAttention):
            return ScaffoldAttention(target, adapter_name, config=lora_config, **kwargs)
        rows = lora_config._plan.trained_rows()
        if isinstance(target, nn.Embedding) and kwargs["target_name"] in rows:
            return TrainedRows(target, adapter_name, config=lora_config, **kwargs)
        if isinstance(target, nn.Embedding):
            return ScaffoldEmbedding(target, adapter_name, config=lora_config, **kwargs)
        layer = ScaffoldLinear(target, adapter_name, config=lora_config, **kwargs)
        if is_foreign(target.weight) and requantise:  # type: ignore[arg-type]
            layer.quantization_backend = resolve_quantization_backend(target, **requantise)
        layer.fan_in_fan_out = layer.is_target_conv_1d_layer = isinstance(target, Conv1D)
        return layer

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        with in_memory(child):  # PEFT puts the adapter where the child is, which may be offloaded
            super()._replace_module(parent, child_name, new_module, child)

    def _finish_adapters(
        self, model: nn.Module, adapter_name: str, plan: Plan, config: LottaLoraConfig, start: bool
    ) -> None:
        names = {tensor.path: tensor.name for tensor in plan.tensors}
        for adapter in plan.adapters:
            layer: Any = model.get_submodule(adapter.path)
            if adapter.kind == "tied_head":
                if not isinstance(layer, TiedHead):
                    parent, _, child = adapter.path.rpartition(".")
                    setattr(model.get_submodule(parent), child, TiedHead(layer, model.get_input_embeddings()))  # type: ignore[operator]
                continue
            layer.switches = self.switches
            layer.scaffold = plan.scaffold.get(adapter.weight) or layer.scaffold
            layer.own_forward = adapter.own_forward
            if not adapter.train_beta:
                layer.freeze_beta(adapter_name)
            if start:
                path = names[adapter.weight].removesuffix("weight")[:-1]
                layer.init_adapter(adapter_name, path, config.effective_adapter_seed, bool(config.init_lora_weights))

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

    # ---- switching ------------------------------------------------------------------------------------------------

    @contextmanager
    def _switching(self) -> Iterator[None]:
        outer, self.switches.by_model = self.switches.by_model, True
        try:
            yield
        finally:
            self.switches.by_model = outer

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters, with the trained tensors of the one that has any.

        Raises:
            ValueError: two of them train copies of the same tensor.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        owner = None if self._layers_disabled else self.trained.owner_among(names)
        self.trained.check_installable(self.model, owner)
        self._frozen = []  # another choice since
        with self._switching():
            super().set_adapter(adapter_name, inference_mode=inference_mode)
        self.trained.install(self.model, owner)
        self._set_trained_grad(names, not inference_mode)
        self._restore_residency()  # PEFT has unmerged layers, and base values are back where trained copies stood

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        self.trained.check_installable(self.model, self.trained.owner_among(self.active_adapters) if enabled else None)
        uninterrupted(lambda: self._switch_layers(enabled))

    def _switch_layers(self, enabled: bool) -> None:
        if not enabled and not self._layers_disabled:
            layers = [module for module in self.model.modules() if isinstance(module, ScaffoldLayer)]
            adapters = [p for layer in layers for name in layer.lora_beta for p in layer.adapter_parameters(name)]
            trained = [p for name in self.plans for p in self.trained.parameters_of(self.model, name).values()]
            self._frozen = [parameter for parameter in (*adapters, *trained) if not parameter.requires_grad]
        self._layers_disabled = not enabled
        with self._switching():
            super()._enable_adapter_layers(enabled)
        self.trained.install(self.model, self.trained.owner_among(self.active_adapters) if enabled else None)
        self._set_trained_grad(self.active_adapters, enabled)
        if enabled:
            for parameter in self._frozen:  # PEFT trains whatever it enables
                parameter.requires_grad_(False)
            self._restore_residency()  # a merged layer that ran while adapters were off has unmerged itself
            self._frozen = []

    def disable_adapter_layers(self) -> None:
        """As PEFT's, without its warning: trained biases are the base model's again, too."""
        self._enable_adapter_layers(enabled=False)

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        """Enable or disable gradients on adapters and their trained tensors."""
        with self._switching():
            super().set_requires_grad(adapter_names, requires_grad)
        self._set_trained_grad([adapter_names] if isinstance(adapter_names, str) else adapter_names, requires_grad)

    def _parameters_of(self, adapter_name: str) -> Iterator[torch.Tensor]:
        """All of one adapter, in an order that its plan decides."""
        for module in self.model.modules():
            if isinstance(module, ScaffoldLayer):
                yield from module.adapter_parameters(adapter_name)
        yield from self.trained.parameters_of(self.model, adapter_name).values()

    def _set_trained_grad(self, adapters: list[str], requires_grad: bool) -> None:
        for name in adapters:
            for parameter in self.trained.parameters_of(self.model, name).values():
                parameter.requires_grad_(requires_grad)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """PEFT's makes new, trainable parameters of an embedding's A and B: keep what was frozen frozen."""
        layers = [layer for layer in self.model.modules() if isinstance(layer, ScaffoldLayer)]
        frozen = [[not p.requires_grad for p in layer.adapter_parameters(adapter_name)] for layer in layers]
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer, flags in zip(layers, frozen, strict=True):
            for parameter, flag in zip(layer.adapter_parameters(adapter_name), flags, strict=True):
                parameter.requires_grad_(not flag)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter and its trained tensors; another one becomes active if it was."""
        self.trained.check_removable(self.model, adapter_name)
        was_active = adapter_name in self.active_adapters
        with self._switching():
            super().delete_adapter(adapter_name)
        self.switches.trained.discard(adapter_name)
        self.trained.remove(self.model, adapter_name)
        self.plans.pop(adapter_name, None)
        if was_active and self.active_adapters:
            self.set_adapter(self.active_adapters)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if self.residency != "dense" and torch.compiler.is_compiling():
            raise RuntimeError("torch.compile needs a scaffold in memory. Call set_residency('dense') first.")
        names = set(kwargs.get("adapter_names") or ())
        owners = sorted(name for name in {*names, self.trained.installed} if self.trained.planned.get(name or ""))
        if names and owners:
            raise ValueError(
                f"adapter_names cannot mix rows while adapters {owners} take part: each has its own copy of whole "
                "trained tensors (head, embeddings or norms). Run them one after the other with set_adapter."
            )
        attention = next((p for p, m in self.model.named_modules() if isinstance(m, ScaffoldAttention)), None)
        if names and attention is not None:
            raise ValueError(
                f"adapter_names is not supported with adapters on nn.MultiheadAttention, as in {attention!r}: they are "
                "summed into its matrices, one sum for all rows. Run the adapters one after the other with set_adapter."
            )
        if names and any(isinstance(module, TiedHead) for module in self.model.modules()):
            raise ValueError(
                "adapter_names is not supported with embeddings='lora' and a tied head, which has one adapter at a "
                "time. Run the adapters one after the other with set_adapter."
            )
        with super()._enable_peft_forward_hooks(*args, **kwargs):
            yield

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: beta scales the scaffold itself, so a weighted sum of adapters is not an adapter of this form."""
        raise ValueError(
            "add_weighted_adapter is not supported: a LottaLoRA adapter also scales the scaffold (beta) and brings its "
            "own trained tensors, and these do not add up like LoRA deltas."
        )

    # ---- saving and loading ---------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As a module's; of a scaffold weight that is not in memory it has a recipe, which `load_state_dict` knows."""
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        recipes: dict[ScaffoldTensor, torch.Tensor] = {}  # what is tied shares one, as it shares its values
        for key, value in state.items():
            if isinstance(value, VirtualWeight) and not isinstance(value, nn.Parameter):  # those keep_vars asks for
                state[key] = recipes.setdefault(value.scaffold, recipe_of(value.scaffold))
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Called before anything of this model is loaded.
        if not (self._off and self.residency == "dense"):  # else there are zeros
            scaffold = {id(getattr(*owner_of(self.model, path))): path for path in self.first_plan.scaffold}
            for name, parameter in self.named_parameters(remove_duplicate=False):
                path, key = scaffold.get(id(parameter)), prefix + name
                if path is not None and key in state_dict and self.base.is_bare(path):
                    state_dict[key] = self.base.state_entry(path, self.first_plan.scaffold[path], state_dict[key])
        super()._load_from_state_dict(state_dict, prefix, *args)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: LottaLoraConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        tuner = tuner_of(model)
        plan = config._plan = tuner.plans[adapter_name]  # the config may have been used for another model since
        tuner.base.check_shapes(plan)
        tuner.base.verify_unsaved(plan)
        config._saved_dtype = next((p.dtype for p in tuner.model.parameters() if p.is_floating_point()), None)
        config._other_dtypes = other_dtypes(tuner.model, config._saved_dtype)
        selected = {MANIFEST_KEY: plan.manifest()}
        live = {cls._remove_adapter_name_from_key(key, adapter_name): key for key in state_dict}
        keys = [live[saved_key(f"{adapter.path}.{name}")] for adapter in plan.adapters for name in adapter.shapes]
        selected.update({key: state_dict[key] for key in keys})
        selected.update(
            {saved_key(path): tuner.base.saved_value(path, adapter_name, state_dict) for path in plan.saved}
        )
        shapes = {
            cls._remove_adapter_name_from_key(key, adapter_name): tuple(value.shape) for key, value in selected.items()
        }
        check_shapes(plan, shapes, "The model", "Change a model (its vocabulary, say) before get_peft_model.")
        return _Complete(selected)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """As PEFT's; of an `AdapterTensor` the parameter's own name goes too. PEFT inverts this when it loads."""
        stem = key.rpartition(".")[0]
        own = stem.endswith(tuple(f".{kind}.{adapter_name}" for kind in ScaffoldLayer.own_tensors))
        return super()._remove_adapter_name_from_key(stem if own else key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: LottaLoraConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """Every way of loading passes here: check all of it, then fill trained and kept tensors; PEFT does the rest."""
        tuner = tuner_of(model)
        tuner.base.check_shapes(tuner.plans[adapter_name])
        tuner._follow(adapter_name, state_dict)
        plan = tuner.plans[adapter_name]
        check_state_dict(plan, state_dict)
        state_dict = {key: value for key, value in state_dict.items() if key != MANIFEST_KEY}
        trained = tuner.trained.parameters_of(tuner.model, adapter_name)
        with torch.no_grad():
            for path in plan.saved:
                value = state_dict.pop(saved_key(path))
                if path in trained:
                    trained[path].copy_(value)
                elif tuner.base.is_bare(path):
                    getattr(*owner_of(tuner.model, path)).copy_(value)
                # else another adapter's copy stands there; the base value is shared and was checked to be the same
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        # With low_cpu_mem_usage these very tensors are installed. In the file's dtype the model would compute otherwise
        # than without; as they lie in a file they are not aligned, on which the rounding of products depends.
        live = model.state_dict(keep_vars=True)
        found = {id(live[key]): value for key, value in remapped.items() if key in live}
        # What lies in a module that stands in several places has several keys, of which PEFT would miss some.
        remapped.update({key: found[id(tensor)] for key, tensor in live.items() if id(tensor) in found})
        return {key: value.to(live[key].dtype, copy=True) if key in live else value for key, value in remapped.items()}

    # ---- looking --------------------------------------------------------------------------------------------------

    def get_plan(self, adapter_name: str | None = None) -> Plan:
        """The plan of an adapter (default: the first active one); printing it shows roles, sizes and shares.

        Raises:
            ValueError: there is no such adapter.
        """
        return self.plans[self._known(adapter_name)]

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
        """Compare the live scaffold, in its dtype, with what the seed draws: sampled runs, or every weight.

        Raises:
            ValueError: a weight differs; the first such tensor is named. Also while adapters are merged.
        """
        scaffold = self.get_plan().scaffold
        with progress("Verifying the scaffold", sum(spec.numel for spec in scaffold.values())) as done:
            for path, spec in scaffold.items():
                self.base.verify(path, spec, full)
                done(spec.numel)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Read by DistributedDataParallel: every rank draws its own scaffold, so none is broadcast."""
        drawn = {id(getattr(*owner_of(self.model, path))) for path in self.get_plan().scaffold}
        named = self.model.named_parameters(remove_duplicate=False)
        return [PREFIX + name for name, parameter in named if id(parameter) in drawn]


def _check_adapter_name(adapter_name: str, model: nn.Module, adapters: Iterable[str]) -> None:
    # PEFT takes an adapter's name out of keys by matching path segments.
    segments = {segment for name in model.state_dict() for segment in name.split(".")} | {UNDECAYED, DECAYED}
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
    model = getattr(model, "module", model)
    tuner = getattr(model, "base_model", model)
    if not isinstance(tuner, LottaLoraModel):
        raise ValueError(f"Expected a PeftModel with a LottaLoRA adapter, got {type(model).__name__}.")
    return tuner
