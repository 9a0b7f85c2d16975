"""Tensors of the base model that adapters train: one copy per adapter, installed where the base value stood.

PEFT's `modules_to_save` wraps whole modules. Norms, biases, class tokens and tied embeddings are single tensors, so
here the *parameter* is exchanged instead: at every path a tied tensor is reached by (a tie cannot break), with no
wrapper in the forward pass, and with no original kept beside it where that can be drawn again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..paths import owner_of
from ..plan.plan import Plan, PlannedTensor
from ..residency.forms import VirtualWeight, resident
from ..residency.partitions import is_partitioned, whole_shape
from ..residency.shards import is_sharded, shards_follow
from ..scaffold.interrupts import uninterrupted
from ..scaffold.tensor import ScaffoldTensor, draw_into
from .progress import progress


def check_shape(model: nn.Module, path: str, shape: tuple[int, ...]) -> None:
    """Whether a live tensor has the shape that was planned for: what is compared by its elements can be a part.

    Raises:
        ValueError: it has another one.
    """
    live = getattr(*owner_of(model, path))
    if whole_shape(live) != shape:
        raise ValueError(
            f"The model has {path!r} with shape {whole_shape(live)}, expected {shape}. Change a model (its vocabulary, "
            "say) before get_peft_model."
        )


class _Shelf(nn.Module):
    """Parameters by path, moved and cast with the model, without being part of its forward pass."""

    def put(self, path: str, parameter: nn.Parameter) -> None:
        parameter.requires_grad_(False)
        self._parameters[path.replace(".", "/")] = parameter  # not register_parameter: PEFT may have patched it to meta

    def drop(self, path: str) -> None:
        self._parameters.pop(path.replace(".", "/"), None)

    def get(self, path: str) -> torch.Tensor | None:
        return self._parameters.get(path.replace(".", "/"))


class TrainedTensors(nn.Module):
    """Per-adapter copies of the trained tensors of one model, of which at most one adapter's are installed."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters: dict[str, _Shelf] = nn.ModuleDict()  # type: ignore[assignment]
        self.originals = _Shelf()  # pretrained values, which cannot be drawn again
        self.planned: dict[str, dict[str, PlannedTensor]] = {}
        self.installed: str | None = None

    def add(self, model: nn.Module, adapter: str, plan: Plan, start: bool = True) -> None:
        """Make the adapter's copies, with their starting values if `start`; they are not installed yet."""
        shelf = _Shelf()
        draws: dict[ScaffoldTensor, torch.Tensor] = {}
        planned = {tensor.path: tensor for tensor in plan.with_role("trained")}
        for path, tensor in planned.items():
            owner, attribute = owner_of(model, path)
            live = getattr(owner, attribute).detach()
            # What can be made again needs no second copy: the first adapter, which is installed at once, trains in the
            # base tensor's own memory. With others there, one of them may read what stands in the model now.
            in_memory = not live.is_meta and not isinstance(live, VirtualWeight)
            reuse = tensor.base is not None and not self.planned and in_memory
            device = "cpu" if live.is_meta else live.device
            of_shards = start and isinstance(tensor.start, ScaffoldTensor) and tensor.start.exact and shards_follow()
            if of_shards and isinstance(tensor.start, ScaffoldTensor):
                copy = resident(tensor.start, "streamed", live.dtype, device)
            else:
                copy = live if reuse else torch.empty(live.shape, dtype=live.dtype, device=device)
            if not start or of_shards:
                pass  # a file has the values, or each shard will have its own
            elif isinstance(tensor.start, ScaffoldTensor):
                draws[tensor.start] = copy
            elif tensor.start is not None:
                copy.copy_(tensor.start)
            elif not live.is_meta:
                original = self.originals.get(path)
                copy.copy_(live if original is None else original)
            shelf.put(path, nn.Parameter(copy, requires_grad=False))
        with progress("Drawing starting values", sum(spec.numel for spec in draws)) as done:
            draw_into(draws, done=done)
        self.adapters[adapter] = shelf
        self.planned[adapter] = planned

    def fill(self, model: nn.Module, adapter: str, path: str, value: torch.Tensor) -> None:
        """Give one of the adapter's copies a value from a file, also where it was going to be drawn shard by shard."""
        mine = self.parameters_of(model, adapter)[path]
        if not isinstance(mine, VirtualWeight):
            mine.copy_(value)
            return
        made = nn.Parameter(value.to(mine.device, mine.dtype, copy=True), requires_grad=mine.requires_grad)
        if adapter != self.installed:
            self.adapters[adapter].put(path, made)
            return
        for alias in self.planned[adapter][path].survey.aliases:
            owner, attribute = owner_of(model, alias)
            owner._parameters[attribute] = made

    def check_addable(self, model: nn.Module, plan: Plan) -> None:
        """Whether the live tensors can be copied for an adapter.

        Raises:
            ValueError: an engine has cut one into parts.
        """
        for tensor in plan.with_role("trained"):
            live = getattr(*owner_of(model, tensor.path))
            if is_sharded(live) or is_partitioned(live):
                raise ValueError(
                    f"{tensor.path!r}, which the adapter would train, is sharded: each rank has a part of it. Add "
                    "adapters before training, or save, and load in one process."
                )

    def replan(self, adapter: str, plan: Plan) -> None:
        """The base values beneath are drawn from another seed now; the adapter's copies stay as they are."""
        self.planned[adapter] = {tensor.path: tensor for tensor in plan.with_role("trained")}

    def install(self, model: nn.Module, adapter: str | None) -> None:
        """Put this adapter's copies in place; with None, or where it has none, the base values."""
        if adapter == self.installed:
            return
        self.check_installable(model, adapter)
        leaving = self.planned.get(self.installed or "", {})
        coming = self.planned.get(adapter or "", {})
        tensors = {**leaving, **coming}
        live = {path: getattr(*owner_of(model, path)) for path in tensors}
        parameters: dict[str, Any] = {}
        for path, tensor in tensors.items():  # takes long, and may be interrupted: nothing has moved yet
            if path in coming:
                parameters[path] = self.adapters[adapter].get(path)  # type: ignore[index]
            elif tensor.base is None:
                parameters[path] = self.originals.get(path)
            else:
                parameters[path] = _made(tensor, live[path])
        left = self.installed

        def exchange() -> None:
            for path, tensor in tensors.items():
                if path in leaving:
                    self.adapters[left].put(path, live[path])  # type: ignore[index]
                elif tensor.base is None and not live[path].is_meta:
                    self.originals.put(path, live[path])
                (self.adapters[adapter] if path in coming else self.originals).drop(path)  # type: ignore[index]
                for alias in tensor.survey.aliases:
                    owner, attribute = owner_of(model, alias)
                    owner._parameters[attribute] = parameters[path]
            self.installed = adapter if coming else None

        uninterrupted(exchange)

    def check_installable(self, model: nn.Module, adapter: str | None) -> None:
        """Whether `install` could go from what is installed to this adapter. Changes nothing.

        Raises:
            ValueError: a tensor has another shape than was planned for, or its base value is needed and the model was
                built without it.
        """
        if adapter == self.installed:
            return
        coming = self.planned.get(adapter or "", {})
        leaving = self.planned.get(self.installed or "", {})
        for path, tensor in {**leaving, **coming}.items():
            check_shape(model, path, tensor.survey.shape)
            live = getattr(*owner_of(model, path))
            if is_sharded(live) or is_partitioned(live):
                raise ValueError(
                    f"{path!r}, which adapter {self.installed or adapter!r} trains, is sharded: its engine holds on to "
                    "it, and another adapter's, or the base value, cannot take its place. Save, and load in one "
                    "process."
                )
        for path, tensor in leaving.items():
            if path not in coming:
                self._check_base(path, tensor)

    def _check_base(self, path: str, tensor: PlannedTensor) -> None:
        if tensor.base is None and self.originals.get(path) is None:
            raise ValueError(
                f"The pretrained value of {path!r} is needed without adapter {self.installed!r}, but the model was "
                "built from an artifact that has the trained value only. Build it over the base model instead: "
                "PeftModel.from_pretrained(base_model, path)."
            )

    def check_removable(self, model: nn.Module, adapter: str) -> None:
        """Whether this adapter could be removed. Changes nothing; raises as `check_installable`."""
        if self.installed == adapter:
            self.check_installable(model, None)

    def base_value(self, model: nn.Module, path: str) -> torch.Tensor:
        """The value of a tensor that no adapter has trained, whatever is installed now.

        Raises:
            ValueError: the model was built without it.
        """
        live: torch.Tensor = getattr(*owner_of(model, path))
        tensor = self.planned.get(self.installed or "", {}).get(path)
        if tensor is None:
            return live
        self._check_base(path, tensor)
        original = self.originals.get(path)
        return original if original is not None else _made(tensor, live)

    def remove(self, model: nn.Module, adapter: str) -> None:
        """Forget an adapter's copies."""
        if adapter in self.planned:
            if self.installed == adapter:
                self.install(model, None)
            del self.planned[adapter]
            del self.adapters[adapter]

    def parameters_of(self, model: nn.Module, adapter: str) -> dict[str, torch.Tensor]:
        """The adapter's copies by path, wherever they are now."""
        if adapter == self.installed:
            return {path: getattr(*owner_of(model, path)) for path in self.planned[adapter]}
        return {path: self.adapters[adapter].get(path) for path in self.planned.get(adapter, {})}  # type: ignore[misc]

    def owner_among(self, adapters: Iterable[str]) -> str | None:
        """Which of these adapters has trained tensors.

        Raises:
            ValueError: more than one has a copy of the same tensor.
        """
        owners = [name for name in adapters if self.planned.get(name)]
        if len(owners) > 1:
            path = next(iter(self.planned[owners[0]]))
            raise ValueError(
                f"Adapters {owners} cannot be active together: each trains its own copy of base tensors such as "
                f"{path!r}. Activate one of them, or train adapters with head, embeddings and norms frozen or 'lora'."
            )
        return owners[0] if owners else None


def _made(tensor: PlannedTensor, like: torch.Tensor) -> nn.Parameter:
    value = torch.empty_like(like, requires_grad=False)
    if isinstance(tensor.base, ScaffoldTensor):
        draw_into({tensor.base: value})
    elif tensor.base is not None:
        value.copy_(tensor.base)
    return nn.Parameter(value, requires_grad=False)
