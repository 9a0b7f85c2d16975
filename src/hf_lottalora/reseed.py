"""Another scaffold under the same adapters: for resampling, seed gating and the scaffold-off ablation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .base_model import BaseTensors
from .config import LottaLoraConfig
from .draw import check_seed
from .layer import ScaffoldLayer
from .plan import Plan
from .planner import plan_from_survey
from .scaffold import ScaffoldTensor, draw_into
from .survey import owner_of
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

    def set_scaffold_seed(self, seed: int) -> None:
        """Draw the whole scaffold from another seed, in place, under the adapters as they are.

        From then on this is the model: an artifact that is saved has this seed. What adapters train is not touched,
        nor where their starting values came from (`adapter_seed`).

        Raises:
            TypeError: the seed is not an integer.
            ValueError: it is out of range, nothing is drawn (`redraw="none"`), or adapters are merged.
        """
        seed = check_seed(seed)
        self._check_switchable()
        for name, old in self.plans.items():
            plan = self.plans[name] = self._replanned(self.peft_config[name], old, seed)
            self.trained.replan(name, plan)
            self.first_plan = plan if old is self.first_plan else self.first_plan
        if self.first_plan.seed != seed:  # its adapter was deleted
            self.first_plan = self._replanned(self.first_config, self.first_plan, seed)
        for path, module in self.model.named_modules():
            if isinstance(module, ScaffoldLayer):
                module.scaffold = self.first_plan.scaffold.get(f"{path}.weight") or module.scaffold
        self._draw()

    @contextmanager
    def scaffold_seed(self, seed: int) -> Iterator[None]:
        """Within the context the scaffold is another seed's; afterwards it is its own again, to the bit.

        Backward passes belong inside: they read the scaffold once more.

        Raises:
            TypeError, ValueError: as `set_scaffold_seed`.

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
        before = self.first_plan.seed
        adapter_seeds = {id(config): config.adapter_seed for config in self._configs()}
        self.set_scaffold_seed(seed)
        try:
            yield
        finally:
            self.set_scaffold_seed(before)
            for config in self._configs():
                config.adapter_seed = adapter_seeds.get(id(config), config.adapter_seed)

    @contextmanager
    def scaffold_off(self) -> Iterator[None]:
        """Within the context every drawn matrix is zero (paper section 3, finding 5); look-up tables stay.

        Raises:
            ValueError: nothing is drawn (`redraw="none"`), or adapters are merged.
        """
        self._check_switchable()
        for tensor in self.first_plan.with_role("scaffold"):
            if tensor.survey.kind == "matrix":
                getattr(*owner_of(self.model, tensor.path)).detach().zero_()
        try:
            yield
        finally:
            self._draw()

    def _configs(self) -> list[LottaLoraConfig]:
        return [self.first_config, *self.peft_config.values()]

    def _check_switchable(self) -> None:
        if not self.first_plan.scaffold:
            raise ValueError("This model has no scaffold to draw: it was made with redraw='none'.")
        if any(isinstance(module, ScaffoldLayer) and module.merged for module in self.model.modules()):
            raise ValueError("Adapters are merged into the scaffold. Call unmerge_adapter() first.")

    def _replanned(self, config: LottaLoraConfig, old: Plan, seed: int) -> Plan:
        config.adapter_seed, config.seed = config.effective_adapter_seed, seed
        plan = config._plan = plan_from_survey(old.survey, config)
        plan.kept_digests.update(old.kept_digests)
        return plan

    def _draw(self) -> None:
        """Draw what is drawn and live: the scaffold, and trained tensors where no adapter's copy stands."""
        drawn = {tensor.path: tensor.base for tensor in self.first_plan.tensors if tensor.role != "kept"}
        draw_into(
            {
                spec: getattr(*owner_of(self.model, path))
                for path, spec in drawn.items()
                if isinstance(spec, ScaffoldTensor) and self.base.is_bare(path)
            }
        )
