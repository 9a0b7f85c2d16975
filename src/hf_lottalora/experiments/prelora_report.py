"""What PreLoRA has seen and decided: its windows, its phases, and the rank of each module."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .figure import COLOURS, GREY, drawing
from .prelora_phases import Phase
from .prelora_windows import Window

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class PreLoraReport:
    """What happened so far. `print(report)` shows tables, `report.plot()` a figure.

    Attributes:
        thresholds: weight and loss, percent.
        windows: in order.
        phases: in order; a training that never converged has one.
        ranks: by module path; empty before the adapters are there.
        families: by module path.
    """

    thresholds: tuple[float, float]
    windows: tuple[Window, ...]
    phases: tuple[Phase, ...]
    ranks: dict[str, int]
    families: dict[str, str]

    @property
    def converged_at(self) -> int | None:
        """The step after which adapters were put in, None if the test has not passed."""
        return next((phase.start for phase in self.phases if phase.name == "joint"), None)

    def __str__(self) -> str:
        weight, loss = self.thresholds
        lines = [f"{'step':>8}  {'phase':<5} {'loss':>10} {'change %':>9} {'||W|| %':>9}  most in"]
        for window in self.windows:
            by_loss = "" if window.loss_change is None else f"{window.loss_change:.3f}"
            most = max(window.weight_changes, key=window.weight_changes.__getitem__, default="")
            by_weight = f"{window.weight_changes[most]:.3f}" if most else ""
            line = f"{window.step:>8}  {window.phase:<5} {window.loss:>10.4f} {by_loss:>9} {by_weight:>9}  {most}"
            lines.append(line.rstrip())
        found = "not yet" if self.converged_at is None else f"after step {self.converged_at}"
        lines.append(f"converged (loss <= {loss:g} %, each family's ||W|| < {weight:g} %): {found}")
        for phase in self.phases:
            share = f"{phase.trained:,} of {phase.total:,} parameters trained"
            lines.append(
                f"{phase.name:<5} from step {phase.start}: {share} ({100 * phase.trained / phase.total:.1f} %)"
            )
        for family in dict.fromkeys(self.families[path] for path in self.ranks):
            counts = Counter(rank for path, rank in self.ranks.items() if self.families[path] == family)
            lines.append(
                f"{family}: " + ", ".join(f"{number} x rank {rank}" for rank, number in sorted(counts.items()))
            )
        return "\n".join(lines)

    def plot(self, path: str | Path | None = None, axes: Axes | None = None) -> Axes:
        """The loss by windows over the phases. Needs matplotlib (`hf-lottalora[plot]`).

        Args:
            path: file to write, its suffix says the format; with None nothing is written.
            axes: to draw into instead of a new figure.

        Raises:
            ValueError: no window is complete yet.
            ModuleNotFoundError: matplotlib is not installed.
        """
        if not self.windows:
            raise ValueError("There is nothing to plot before the first window is complete.")
        end = self.windows[-1].step
        with drawing(axes, path, "PreLoRA: full training, adapters beside it, adapters alone") as axes:
            for number, phase in enumerate(self.phases):
                until = self.phases[number + 1].start if number + 1 < len(self.phases) else end
                label = f"{phase.name}: {100 * phase.trained / phase.total:.0f} % trained"
                axes.axvspan(phase.start, until, color=COLOURS[number], alpha=0.15, linewidth=0, label=label)
            steps, losses = [window.step for window in self.windows], [window.loss for window in self.windows]
            axes.plot(steps, losses, color=GREY, marker="o", markersize=3, label="loss, mean of a window")
            axes.set(xlabel="optimizer steps", ylabel="loss", xlim=(0, end))
            axes.legend(frameon=False)
        return axes
