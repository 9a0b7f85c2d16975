"""Another scaffold under the same adapters: for resampling, seed gating and the scaffold-off ablation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..artifact.manifest import check_state_dict, read_manifest
from ..config import LottaLoraConfig
from ..layers.walk import scaffold_layers
from ..paths import owner_of
from ..plan.plan import MANIFEST_KEY, Plan
from ..plan.planner import plan_from_survey
from ..residency.forms import VirtualWeight
from ..scaffold.draw import check_seed
from ..scaffold.interrupts import uninterrupted
from ..scaffold.tensor import ScaffoldTensor, draw_into
from .base_model import BaseTensors
from .progress import progress
from .trained import TrainedTensors


class SeedSwitching:
    """The part of `LottaLoraModel` that draws the scaffold again from another seed."""

    model: nn.Module
    base: BaseTensors
    trained: TrainedTensors
    plans: dict[str, Plan]
    peft_config: dict[str, LottaLoraConfig]
    first_config: LottaLoraConfig
    first_plan: Plan

    _switched = 0  # how many of the contexts below are open
    _off = 0  # how many of them are scaffold_off

    follows_checkpoints = False  # whether loading an adapter of another seed draws that seed's scaffold first
    followed_from: int | None = None  # the seed before that

    def set_scaffold_seed(self, seed: int) -> None:
        """Draw the whole scaffold from another seed, in place, under the adapters as they are.

        From then on this is the model: an artifact that is saved has this seed. What adapters train is not touched,
        nor where their starting values came from (`adapter_seed`), nor what is kept. The backward pass of an earlier
        forward pass is an error. Interrupted, the scaffold is the one it was.

        Raises:
            TypeError: the seed is not an integer.
            ValueError: it is out of range, nothing is drawn (`redraw="none"`), adapters are merged, or a context that
                restores the scaffold is open.
        """
        seed = check_seed(seed)
        self._check_switchable()
        if self._switched:
            raise ValueError(
                "Within scaffold_seed or scaffold_off, which restore the scaffold at their end, it cannot be changed "
                "for good. Call set_scaffold_seed outside, or open another scaffold_seed."
            )
        restore = self._restorer()
        try:
            self._switch(seed)
        except BaseException:  # Ctrl-C too
            uninterrupted(restore)
            raise

    @contextmanager
    def scaffold_seed(self, seed: int) -> Iterator[None]:
        """Within the context the scaffold is another seed's; afterwards it is its own again, to the bit.

        Also where the context, or its beginning or end, is interrupted.

        Backward passes belong inside: they read the scaffold once more. Merging does not.

        Raises:
            TypeError, ValueError: as `set_scaffold_seed`; also where the scaffold is not what its seed draws, since it
                could not be that again.

        Example:
            >>> import torch
            >>> from hf_lottalora import LottaLoraConfig
            >>> from peft import get_peft_model
            >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
            >>> model = get_peft_model(net, LottaLoraConfig(seed=42, r=1, target_modules=["0"], modules_to_save=["1"]))
            >>> before = net[0].weight.clone()
            >>> with model.scaffold_seed(43):
            ...     torch.equal(net[0].weight, before)
            False
            >>> torch.equal(net[0].weight, before)
            True
        """
        seed = check_seed(seed)
        self._check_switchable()
        self._check_restorable()
        restore = self._restorer()
        try:
            self._switched += 1
            self._switch(seed)
            yield
        finally:
            uninterrupted(restore)

    @contextmanager
    def scaffold_off(self) -> Iterator[None]:
        """Within the context every drawn matrix is zero (paper section 3, finding 5); look-up tables stay.

        Backward passes belong inside. Merging does not.

        Raises:
            ValueError: nothing is drawn (`redraw="none"`), adapters are merged, a matrix is under weight norm, or the
                scaffold is not what its seed draws, so that it could not be that again.
        """
        self._check_switchable()
        self._check_restorable()
        direction = next((path for path in self.first_plan.scaffold if path.endswith(".original1")), None)
        if direction:
            raise ValueError(f"{direction!r} is a direction under weight norm, which cannot be zero.")
        before = self._switched, self._off

        def restore() -> None:
            self._switched, self._off = before
            self._draw()

        try:
            self._switched, self._off = self._switched + 1, self._off + 1
            self._draw()
            yield
        finally:
            uninterrupted(restore)

    def __getstate__(self) -> object:
        if self._switched:
            raise RuntimeError(
                "Within scaffold_seed or scaffold_off a model cannot be copied or pickled: the copy would not have the "
                "end of the context. Copy it outside, and use set_scaffold_seed on the copy."
            )
        return super().__getstate__()

    def _check_restorable(self) -> None:
        if not self._switched:  # else what is live may be zeros, and is checked already
            for path, spec in self.first_plan.scaffold.items():
                if spec.exact and self.base.is_bare(path):
                    self.base.verify(path, spec, runs=1)

    def _check_switchable(self) -> None:
        if not self.first_plan.scaffold:
            raise ValueError("This model has no scaffold to draw: it was made with redraw='none'.")
        if any(layer.merged for layer in scaffold_layers(self.model)):
            raise ValueError("Adapters are merged into the scaffold. Call unmerge_adapter() first.")
        self.base.check_shapes(self.first_plan)

    def _follow(self, adapter_name: str, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Draw the scaffold that this adapter was saved over; checks first that it then fits in every way."""
        plan, seed = self.plans[adapter_name], read_manifest(state_dict.get(MANIFEST_KEY), "The adapter file")["seed"]
        if self.follows_checkpoints and seed != plan.seed:
            replanned = self._replanned(self.peft_config[adapter_name], plan, seed)[1]
            check_state_dict(replanned, state_dict, self.model, None)
            self.followed_from = plan.seed if self.followed_from is None else self.followed_from
            self.set_scaffold_seed(seed)

    def _restorer(self) -> Callable[[], None]:
        """What makes scaffold, plans and configs again what they are now."""
        configs, plans, first = dict(self.peft_config), dict(self.plans), (self.first_config, self.first_plan)
        switched = self._switched

        def restore() -> None:
            self._switched = switched
            self._switch(first[1].seed)
            self.first_config, self.first_plan = first
            for name in configs.keys() & self.peft_config.keys():
                self.peft_config[name] = configs[name]
                self._use(name, plans[name])

        return restore

    def _switch(self, seed: int) -> None:
        for name, old in self.plans.items():
            config = self.peft_config[name]
            self.peft_config[name], plan = self._replanned(config, old, seed)
            if config is self.first_config:
                self.first_config, self.first_plan = self.peft_config[name], plan
            self._use(name, plan)
        if self.first_plan.seed != seed:  # its adapter was deleted
            self.first_config, self.first_plan = self._replanned(self.first_config, self.first_plan, seed)
        self._draw()

    def _replanned(self, config: LottaLoraConfig, old: Plan, seed: int) -> tuple[LottaLoraConfig, Plan]:
        """The config and plan for another seed; a config may be other models' too, so it is copied."""
        config = copy.copy(config)
        config.adapter_seed, config.seed = config.effective_adapter_seed, seed
        plan = config._plan = plan_from_survey(old.survey, config, again=True)
        plan.kept_digests.update(old.kept_digests)
        return config, plan

    def _use(self, name: str, plan: Plan) -> None:
        """Make this the plan of an adapter."""
        self.plans[name] = plan
        self.trained.replan(name, plan)
        for adapter in plan.adapters:
            if adapter.kind != "tied_head":
                layer: Any = self.model.get_submodule(adapter.path)
                layer.scaffold = plan.scaffold.get(adapter.weight) or layer.scaffold

    def _draw(self) -> None:
        """Draw what is drawn and live: the scaffold, and trained tensors where no adapter's copy stands."""
        draws = {}
        for tensor in self.first_plan.tensors:
            live = getattr(*owner_of(self.model, tensor.path))
            live = live if isinstance(live, VirtualWeight) else live.detach()
            if tensor.path.endswith(".original0") and isinstance(tensor.base, torch.Tensor):
                live.copy_(tensor.base)  # size under weight norm: that of the direction that is drawn
            elif tensor.role == "kept" or not isinstance(tensor.base, ScaffoldTensor):
                continue
            elif isinstance(live, VirtualWeight):
                off = self._off and tensor.survey.kind == "matrix"
                live.assign(replace(tensor.base, family="zero") if off else tensor.base)
            elif self._off and tensor.role == "scaffold" and tensor.survey.kind == "matrix":
                live.zero_()
            elif self.base.is_bare(tensor.path):
                draws[tensor.base] = live
        with progress("Drawing the scaffold", sum(spec.numel for spec in draws)) as done:
            draw_into(draws, done=done)
