"""PreLoRA's phases: full training, adapters beside it, adapters alone; and going on in one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel

from ..config import LottaLoraConfig
from ..plan.plan import Plan
from .prelora_trainer import frozen_in, inject, load_strictly, renew, rewarm, set_step, train_all_but
from .prelora_windows import PhaseName


@dataclass(frozen=True)
class Phase:
    """A part of the training.

    Attributes:
        name: "full", "joint" or "lora".
        start: optimizer steps before it.
        trained: parameters that are trained in it.
        total: parameters of the model, with adapters.
    """

    name: PhaseName
    start: int
    trained: int
    total: int


class Phases:
    """Those of one Trainer, which `join` and `freeze` change while it trains.

    Args:
        trainer: whose model it is.
        config: of the adapters.
        rewarmup_steps: over how many the learning rate rises again when they are alone.
    """

    def __init__(self, trainer: Any, config: LottaLoraConfig, rewarmup_steps: int) -> None:
        self.trainer, self.config, self.rewarmup_steps = trainer, config, rewarmup_steps
        self.begun: list[Phase] = []
        self.ranks: dict[str, int] = {}
        self.model: PeftModel | None = None  # once adapters are in
        self.frozen: set[str] = set()  # what the user has frozen

    @property
    def name(self) -> PhaseName:
        """Of the one it is in."""
        return self.begun[-1].name if self.begun else "full"

    def start(self) -> None:
        """Train what the user trains."""
        self.frozen = frozen_in(self.trainer.model)
        self._begin("full", 0)

    def join(self, ranks: Mapping[str, int], step: int) -> None:
        """Put adapters in; everything is trained."""
        self._inject(ranks, "joint")
        self._go_on("joint", step)

    def freeze(self, step: int) -> None:
        """Train the weights under the adapters no more."""
        self._set_trained("lora")
        self._go_on("lora", step)

    def rewarm(self) -> None:
        """Let the schedule rise again from where adapters were alone first."""
        if self.name == "lora":
            rewarm(self.trainer.lr_scheduler, self.begun[-1].start, self.rewarmup_steps)

    def state_dict(self) -> dict[str, Any]:
        """All of it as JSON has it."""
        return {"begun": [asdict(phase) for phase in self.begun], "ranks": self.ranks}

    def restore(self, state: Mapping[str, Any], folder: Path) -> None:
        """Make of a new model the one of a checkpoint: adapters first, then all weights.

        Raises:
            ValueError: as `load_strictly`.
        """
        begun = [Phase(**phase) for phase in state["begun"]]
        self.frozen = frozen_in(self.trainer.model)
        if state["ranks"]:
            self._inject(state["ranks"], begun[-1].name)
        load_strictly(self.trainer.model, folder)
        self.begun = begun

    def _inject(self, ranks: Mapping[str, int], name: PhaseName) -> None:
        self.ranks = dict(ranks)
        self.model = inject(self.trainer.model, self.config, ranks)
        self._set_trained(name)

    def _set_trained(self, name: PhaseName) -> None:
        assert self.model is not None
        under = _adapted(self.model.base_model.get_plan()) if name == "lora" else set()
        train_all_but(self.trainer.model, self.frozen | under)

    def _go_on(self, name: PhaseName, step: int) -> None:
        self._begin(name, step)
        renew(self.trainer)
        self.rewarm()
        set_step(self.trainer.lr_scheduler, step)

    def _begin(self, name: PhaseName, step: int) -> None:
        parameters = list(self.trainer.model.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        self.begun.append(Phase(name, step, trained, sum(p.numel() for p in parameters)))


def _adapted(plan: Plan) -> set[str]:
    """Paths of the weights under adapters and of their biases, but for such as the adapter trains."""
    trained = {tensor.path for tensor in plan.with_role("trained")}
    return {path for adapter in plan.adapters for path in (adapter.weight, adapter.biased)} - trained
