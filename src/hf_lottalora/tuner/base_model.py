"""The base model itself: every frozen tensor gets its value, once, in place; later it is found under the adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..layers.attention import ScaffoldAttention
from ..layers.layer import ScaffoldLayer
from ..paths import clean_modules, owner_of
from ..plan.plan import PREFIX, Plan, PlannedTensor
from ..residency.foreign import foreign_tensors, in_memory, values_of
from ..residency.forms import Residency, VirtualWeight, resident
from ..residency.partitions import gathered, partitions_follow
from ..residency.recipe import read_recipe
from ..residency.shards import local_part, shards_follow
from ..scaffold.tensor import RUNS, ScaffoldTensor, draw_into, sampled_digest
from .progress import progress
from .trained import TrainedTensors, check_shape


def other_dtypes(model: nn.Module, dtype: torch.dtype | None) -> dict[str, str]:
    """Dtypes by clean path that building the architecture in `dtype` would not give.

    Unsaved buffers in half precision (rotary tables that `model.half()` has rounded), and parameters that some
    architectures hold in another precision than the rest.
    """
    found = {}
    for path, module in clean_modules(model):
        for name, buffer in module._buffers.items():
            unsaved = name in module._non_persistent_buffers_set
            if buffer is not None and unsaved and buffer.dtype in (torch.float16, torch.bfloat16):
                found[f"{path}.{name}"] = buffer.dtype
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point() and parameter.dtype != dtype:
                found[f"{path}.{name}"] = parameter.dtype
    return {path: str(found[path]).removeprefix("torch.") for path in found}


def check_loadable(model: nn.Module, plan: Plan) -> None:
    """Refuse a model on the meta device that would be left with tensors without a value.

    Raises:
        ValueError: a buffer is on the meta device, or a parameter there is neither drawn nor saved.
    """
    held = foreign_tensors(model)
    for path, module in clean_modules(model):
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta and id(buffer) not in held:
                raise ValueError(
                    f"Buffer '{path}.{name}' is on the meta device, and nothing here can compute it. Build the model "
                    "under accelerate.init_empty_weights(include_buffers=False) instead of torch.device('meta')."
                )
    for tensor in plan.tensors:
        live = getattr(*owner_of(model, tensor.path))
        if live.is_meta and tensor.base is None and not tensor.saved and id(live) not in held:
            raise ValueError(
                f"{tensor.path!r} is on the meta device and is neither drawn nor saved, so it has no value. Load the "
                "base model's weights first, or pass redraw='all'. (PeftModel.from_pretrained lets go of what is "
                "offloaded to disk: get_peft_model, then set_peft_model_state_dict.)"
            )


def materialise(model: nn.Module, plan: Plan, residency: Residency = "dense") -> None:
    """Give every frozen tensor of the base model its value: the scaffold in one parallel pass, in place."""
    with progress("Drawing the scaffold", sum(spec.numel for spec in plan.scaffold.values())) as done:
        _materialise(model, plan, residency, done)


def _materialise(model: nn.Module, plan: Plan, residency: Residency, done: Callable[[int], None]) -> None:
    draws = {}
    if residency == "dense" and (shards_follow() or partitions_follow()):
        residency = "streamed"  # until then: each rank draws its shard, and no more
    for tensor in plan.tensors:
        if tensor.role == "trained":
            continue
        live = getattr(*owner_of(model, tensor.path))
        if residency != "dense" and isinstance(tensor.base, ScaffoldTensor) and can_be_virtual(model, tensor):
            device = "cpu" if live.is_meta else live.device
            replace_parameter(model, tensor, resident(tensor.base, residency, live.dtype, device))
            done(tensor.base.numel)
            continue
        if live.is_meta and tensor.survey.held is None:
            live = replace_parameter(model, tensor, torch.empty(live.shape, dtype=live.dtype))
        if isinstance(tensor.base, ScaffoldTensor):
            draws[tensor.base] = live
        elif tensor.base is not None:
            with torch.no_grad():
                live.copy_(tensor.base)
    draw_into(draws, done=done)


def can_be_virtual(model: nn.Module, tensor: PlannedTensor) -> bool:
    """Whether a scaffold tensor can be other than dense: not what fused kernels read by its address."""
    owner, attribute = owner_of(model, tensor.path)
    exact = isinstance(tensor.base, ScaffoldTensor) and tensor.base.exact
    elsewhere = isinstance(owner, (nn.RNNBase, nn.MultiheadAttention))
    return tensor.role == "scaffold" and exact and attribute in owner._parameters and not elsewhere


def replace_parameter(model: nn.Module, tensor: PlannedTensor, value: torch.Tensor) -> nn.Parameter:
    """Another parameter in the place of a frozen one, also where it is tied."""
    live = nn.Parameter(value, requires_grad=False)
    for path in {tensor.path, *tensor.survey.aliases}:
        owner, attribute = owner_of(model, path)
        owner._parameters[attribute] = live
    return live


class BaseTensors:
    """The tensors of a base model while adapters are over it: installed in their place, or merged into them."""

    def __init__(self, model: nn.Module, trained: TrainedTensors) -> None:
        self.model, self.trained = model, trained

    def set_residency(self, plan: Plan, residency: Residency) -> None:
        """Hold the scaffold dense, packed or streamed, tensor by tensor; the values stay.

        Raises:
            ValueError: a dense weight is not what the seed draws, so giving it up would change the model; or one has
                another shape.
        """
        if residency != "dense":
            self.check_shapes(plan)
        bare = [tensor for tensor in plan.with_role("scaffold") if self.is_bare(tensor.path)]
        for tensor in bare if residency != "dense" else ():
            dense = not isinstance(getattr(*owner_of(self.model, tensor.path)), VirtualWeight)
            if dense and can_be_virtual(self.model, tensor):
                assert isinstance(tensor.base, ScaffoldTensor)
                self.verify(tensor.path, tensor.base)
        with progress("Changing the residency", sum(tensor.survey.numel for tensor in bare)) as done:
            for tensor in bare:
                self._hold(tensor, residency)
                done(tensor.survey.numel)

    def _hold(self, tensor: PlannedTensor, residency: Residency) -> None:
        live = getattr(*owner_of(self.model, tensor.path))
        if residency == "dense":
            if isinstance(live, VirtualWeight):
                replace_parameter(self.model, tensor, live.dense())
        elif isinstance(live, VirtualWeight):
            live.hold(residency)
        elif can_be_virtual(self.model, tensor):
            assert isinstance(tensor.base, ScaffoldTensor)
            replace_parameter(self.model, tensor, resident(tensor.base, residency, live.dtype, live.device))

    def check_shapes(self, plan: Plan) -> None:
        """Whether all tensors have the shapes that were planned for.

        Raises:
            ValueError: one has another, such as embeddings of a vocabulary that was resized later.
        """
        for tensor in plan.tensors:
            check_shape(self.model, tensor.path, tensor.survey.shape)

    def is_bare(self, path: str) -> bool:
        """Whether the live tensor is the base model's own: nothing trained stands there, nothing is merged into it."""
        installed = self.trained.planned.get(self.trained.installed or "", {})
        return path not in installed and self._merged_layer(path) is None

    def value(self, path: str) -> torch.Tensor:
        """The value of a tensor without any adapter."""
        merged = self._merged_layer(path)
        if merged is None:
            return self.trained.base_value(self.model, path)
        layer, attribute = merged
        return layer.original_weight() if attribute == "weight" else layer.original_bias()

    def saved_value(self, path: str, adapter: str, state_dict: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What this adapter's artifact contains: its trained copy, or the base value. From `state_dict` if live."""
        installed = self.trained.installed == adapter
        copy = None if installed else self.trained.parameters_of(self.model, adapter).get(path)
        if copy is not None:
            return copy
        if path in self.trained.planned.get(adapter, {}) or self.is_bare(path):
            return state_dict[PREFIX + self._state_path(path)]
        return self.value(path)

    def kept_digests(self, plan: Plan) -> dict[str, str]:
        """Digest by name of each kept tensor that the artifact does not contain."""
        return {name: sampled_digest(value) for name, value in self.kept(plan)}

    def kept(self, plan: Plan) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and value of each kept tensor that the artifact does not contain, in memory one at a time."""
        for tensor in plan.with_role("kept"):
            if not tensor.saved:
                owner, attribute = owner_of(self.model, tensor.path)
                with in_memory(owner), gathered([getattr(owner, attribute)]):
                    yield tensor.name, values_of(self.value(tensor.path))

    def check_kept(self, values: Mapping[str, torch.Tensor]) -> None:
        """Whether these are the values of the base, which other adapters are over too.

        Raises:
            ValueError: one is another, by path.
        """
        for path, value in values.items():
            mine = self.value(path)
            if not torch.equal(value.to(mine.device, mine.dtype), mine):
                raise ValueError(
                    f"The artifact has another {path!r} than the base model that the other adapters are over. Nothing "
                    "was loaded. Load it into a model of its own."
                )

    def verify_unsaved(self, plan: Plan) -> None:
        """Before saving: what is not saved must be what the seed draws. A merged layer's weight is drawn again."""
        for path, spec in plan.scaffold.items():
            if self.is_bare(path):
                self.verify(path, spec)

    def verify(self, path: str, spec: ScaffoldTensor, full: bool = False, runs: int = RUNS) -> None:
        """Compare a live weight, in its dtype, with what the seed draws: so many sampled runs, or every element.

        Raises:
            ValueError: they differ.
        """
        check_shape(self.model, path, spec.shape)
        live, offset = local_part(getattr(*owner_of(self.model, path)))
        if not (
            live.holds(spec, full, runs) if isinstance(live, VirtualWeight) else spec.is_in(live, full, runs, offset)
        ):
            raise ValueError(
                f"{path!r} is not what seed {spec.seed} draws for {spec.name!r} in {live.dtype}. It was changed, "
                "merged into (see unmerge_adapter), averaged, or cast to a smaller dtype and back. "
                f"set_scaffold_seed({spec.seed}) draws it again."
            )

    def state_entry(self, path: str, spec: ScaffoldTensor, entry: torch.Tensor) -> torch.Tensor:
        """What to load for an entry of a state dict, in whatever residency that was made: the same weight.

        Raises:
            ValueError: it is another weight.
        """
        live: torch.Tensor = getattr(*owner_of(self.model, path))
        virtual = isinstance(live, VirtualWeight)
        spec = live.scaffold if isinstance(live, VirtualWeight) else spec  # which scaffold_off exchanges
        saved = read_recipe(entry)
        if saved == spec:
            return live if virtual or spec.is_in(live) else spec.draw(live.dtype, live.device)
        if saved is None:
            if entry.shape != live.shape:
                return entry  # torch says so
            part, offset = local_part(entry)
            if spec.is_in(part, offset=offset):
                return live if virtual else entry
            if not virtual and torch.equal(part.to(live.device, live.dtype), local_part(live)[0]):
                return entry  # rounded alike
        other = "other weights" if saved is None else f"{saved.name!r} of seed {saved.seed}, family {saved.family!r},"
        raise ValueError(
            f"The state dict has {other} where this model has {path!r} as {spec.name!r} of seed {spec.seed}, family "
            f"{spec.family!r}. Nothing was loaded. Load it into a model with the same scaffold (see set_scaffold_seed)."
        )

    def layer_of(self, path: str) -> tuple[ScaffoldLayer, str] | None:
        """The layer whose weight or bias this tensor is, and which of the two; None where no adapter stands there."""
        owner, _, attribute = path.rpartition(".")
        layer = self.model.get_submodule(owner)
        if isinstance(layer, ScaffoldAttention):
            name, _, attribute = attribute.rpartition("_")
            layer = layer._modules.get(name) or layer
        return (layer, attribute) if isinstance(layer, ScaffoldLayer) and attribute in ("weight", "bias") else None

    def _merged_layer(self, path: str) -> tuple[ScaffoldLayer, str] | None:
        """The layer that has merged adapters into this tensor, and whether it is its weight or bias."""
        found = self.layer_of(path)
        if found is None or not found[0].merged:
            return None
        layer, attribute = found
        return found if attribute == "weight" or layer._unmerged_bias is not None else None

    def _state_path(self, path: str) -> str:
        """The path that a base tensor has now that PEFT has wrapped some modules."""
        parts = []
        module = self.model
        *parents, attribute = path.split(".")
        for parent in parents:
            parts.append(parent)
            module = getattr(module, parent)
            if isinstance(module, BaseTunerLayer):
                parts.append("base_layer")
                module = module.base_layer  # type: ignore[assignment]
        return ".".join([*parts, attribute])
