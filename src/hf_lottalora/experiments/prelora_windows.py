"""What PreLoRA measures while a model trains: the loss by windows of steps, and the norms of weights at their ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any, Literal, get_args

import torch

from .prelora_rules import change, choose_ranks, converged, family_changes

PhaseName = Literal["full", "joint", "lora"]
NAMES: tuple[PhaseName, ...] = get_args(PhaseName)


@dataclass(frozen=True)
class Window:
    """A number of optimizer steps.

    Attributes:
        step: the last of them.
        phase: which it ended in.
        loss: mean of the training loss over its steps, and over all processes.
        loss_change: percent, from the window before; None for the first, and after full training.
        weight_changes: likewise, by family, the mean over its modules of the relative change of ||W||.
    """

    step: int
    phase: PhaseName
    loss: float
    loss_change: float | None
    weight_changes: dict[str, float]


class Windows:
    """The windows so far, of which the last few are compared.

    Args:
        settings: those of `PreLoraCallback`.
        families: by module path.
    """

    def __init__(self, settings: Mapping[str, Any], families: Mapping[str, str]) -> None:
        self.settings, self.families = settings, families
        self.ended: list[Window] = []
        self.recent: list[dict[str, Any]] = []  # loss and norms of those that are compared
        self.sum: torch.Tensor | float = 0.0  # of the loss over the steps so far of the window that has not ended
        self.steps = 0

    def add(self, loss: torch.Tensor | float) -> None:
        """One more step."""
        self.sum, self.steps = self.sum + loss, self.steps + 1

    @property
    def full(self) -> bool:
        """Whether the window has all of its steps."""
        return bool(self.steps == self.settings["window"])

    def end(self, step: int, phase: PhaseName, norms: Mapping[str, Mapping[str, float]] | None) -> bool:
        """Record the window, and begin the next one; whether the test passes.

        Args:
            step: the last one.
            phase: of the training.
            norms: "weights", and "gradients" where these choose ranks, by module path; None where nothing is tested.
        """
        loss, self.sum, self.steps = float(self.sum / self.steps), 0.0, 0
        if norms is None:
            self.ended.append(Window(step, phase, loss, None, {}))
            self.recent = []
            return False
        before = self.recent[-1] if self.recent else None
        by_loss = None if before is None else 100 * change(before["loss"], loss)
        changes = {} if before is None else family_changes(before["weights"], norms["weights"], self.families)
        self.ended.append(Window(step, phase, loss, by_loss, {family: 100 * c for family, c in changes.items()}))
        self.recent = [*self.recent, {"loss": loss, "changes": changes, **norms}][-self.settings["windows"] :]
        return len(self.recent) == self.settings["windows"] and converged(
            [window["loss"] for window in self.recent],
            [window["changes"] for window in self.recent[1:]],
            *self.settings["thresholds"],
        )

    def choose_ranks(self) -> dict[str, int]:
        """The rank of each module by its change from the last window but one to the last."""
        before, after = (window[self.settings["rank_by"]] for window in self.recent[-2:])
        return choose_ranks(before, after, self.families, self.settings["ranks"])

    def logged(self) -> dict[str, float]:
        """Of the last window, what a Trainer logs."""
        window = self.ended[-1]
        entry: dict[str, float] = {"prelora_loss": window.loss, "prelora_phase": NAMES.index(window.phase)}
        if window.loss_change is not None:
            entry |= {
                "prelora_loss_change": window.loss_change,
                "prelora_weight_change": max(window.weight_changes.values()),
            }
        return entry

    def logged_ranks(self, ranks: Mapping[str, int]) -> dict[str, float]:
        """The mean rank of each family."""
        return {
            f"prelora_rank/{family}": mean(rank for path, rank in ranks.items() if self.families[path] == family)
            for family in dict.fromkeys(self.families.values())
        }

    def state_dict(self) -> dict[str, Any]:
        """All of it as JSON has it."""
        ended = [asdict(window) for window in self.ended]
        return {"ended": ended, "recent": self.recent, "sum": float(self.sum), "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another one was."""
        self.ended = [Window(**window) for window in state["ended"]]
        self.recent, self.sum, self.steps = state["recent"], state["sum"], state["steps"]
