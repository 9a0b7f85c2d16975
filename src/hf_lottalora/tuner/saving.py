"""The part of `LottaLoraModel` that gives and takes tensors: an adapter's artifact, and state dicts of whole models."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import torch
from torch import nn

from ..artifact.manifest import check_shapes, check_state_dict, with_manifest
from ..artifact.stored import decoded
from ..config import LottaLoraConfig
from ..layers.layer import ScaffoldLayer
from ..paths import owner_of
from ..plan.plan import Plan, saved_key
from ..residency.forms import Residency, VirtualWeight
from ..residency.recipe import recipe_of
from ..scaffold.tensor import ScaffoldTensor
from .base_model import BaseTensors, other_dtypes
from .trained import TrainedTensors


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


class Saving:
    """PEFT's hooks of saving and loading an adapter, and torch's of a whole model."""

    model: nn.Module
    base: BaseTensors
    trained: TrainedTensors
    plans: dict[str, Plan]
    first_plan: Plan
    residency: Residency
    named_parameters: Callable[..., Iterator[tuple[str, nn.Parameter]]]
    _off: int
    _follow: Callable[[str, Mapping[str, torch.Tensor]], None]

    @classmethod
    def _tuner_of(cls, model: nn.Module) -> Self:
        model = getattr(model, "module", model)
        tuner = getattr(model, "base_model", model)
        if not isinstance(tuner, cls):
            raise ValueError(f"Expected a PeftModel with a LottaLoRA adapter, got {type(model).__name__}.")
        return tuner

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As a module's; of a scaffold weight that is not in memory it has a recipe, which `load_state_dict` knows."""
        state: dict[str, Any] = super().state_dict(*args, **kwargs)  # type: ignore[misc]
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
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: LottaLoraConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        tuner = cls._tuner_of(model)
        plan = config._plan = tuner.plans[adapter_name]  # the config may have been used for another model since
        tuner.base.check_shapes(plan)
        tuner.base.verify_unsaved(plan)
        config._saved_dtype = next((p.dtype for p in tuner.model.parameters() if p.is_floating_point()), None)
        config._other_dtypes = other_dtypes(tuner.model, config._saved_dtype)
        selected = {}
        live = {cls._remove_adapter_name_from_key(key, adapter_name): key for key in state_dict}
        keys = [live[saved_key(f"{adapter.path}.{name}")] for adapter in plan.adapters for name in adapter.shapes]
        selected.update({key: state_dict[key] for key in keys})
        selected.update(
            {saved_key(path): tuner.base.saved_value(path, adapter_name, state_dict) for path in plan.saved}
        )
        given = {cls._remove_adapter_name_from_key(key, adapter_name): key for key in selected}
        named = {name: selected[key] for name, key in given.items()}
        shapes = {name: tuple(value.shape) for name, value in named.items()}
        advice = "Change a model (its vocabulary, say) before get_peft_model."
        check_shapes(plan.saved_shapes(), shapes, "The model", advice)
        found = with_manifest(plan, config, named, lambda: tuner.base.kept(plan))
        return _Complete({given.get(name, name): value for name, value in found.items()})

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """As PEFT's; of an `AdapterTensor` the parameter's own name goes too. PEFT inverts this when it loads."""
        stem = key.rpartition(".")[0]
        own = stem.endswith(tuple(f".{kind}.{adapter_name}" for kind in ScaffoldLayer.own_tensors))
        return super()._remove_adapter_name_from_key(stem if own else key, adapter_name)  # type: ignore[misc]

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: LottaLoraConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """Every way of loading passes here: check all of it, then fill trained and kept tensors; PEFT does the rest."""
        tuner = cls._tuner_of(model)
        tuner.base.check_shapes(tuner.plans[adapter_name])
        tuner._follow(adapter_name, state_dict)
        plan = tuner.plans[adapter_name]
        content = check_state_dict(plan, state_dict, tuner.model, config._artifact_manifest)
        state_dict = decoded(plan, content.get("stored"), state_dict, "The adapter file")
        config._stored = content.get("stored")
        trained = tuner.trained.parameters_of(tuner.model, adapter_name)
        if len(tuner.plans) > 1:
            tuner.base.check_kept({path: state_dict[saved_key(path)] for path in plan.saved if path not in trained})
        with torch.no_grad():
            for path in plan.saved:
                value = state_dict.pop(saved_key(path))
                if path in trained:
                    tuner.trained.fill(tuner.model, adapter_name, path, value)
                elif tuner.base.is_bare(path):
                    getattr(*owner_of(tuner.model, path)).copy_(value)
                # else another adapter's copy stands there; the base value is shared, and was found to be the same
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)  # type: ignore[misc]
        # With low_cpu_mem_usage these very tensors are installed. In the file's dtype the model would compute otherwise
        # than without; as they lie in a file they are not aligned, on which the rounding of products depends.
        live = model.state_dict(keep_vars=True)
        found = {id(live[key]): value for key, value in remapped.items() if key in live}
        # What lies in a module that stands in several places has several keys, of which PEFT would miss some.
        remapped.update({key: found[id(tensor)] for key, tensor in live.items() if id(tensor) in found})
        return {key: value.to(live[key].dtype, copy=True) if key in live else value for key, value in remapped.items()}
