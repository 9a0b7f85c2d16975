"""What the betas say (paper section 3, finding 1): per layer, by depth, beside the spectral norm of the scaffold."""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.sparse.linalg import svds
from transformers import Trainer, TrainerCallback

from ..layers.layer import ScaffoldLayer
from ..tuner.model import tuner_of
from .figure import COLOURS, GREY, MARKERS, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from peft import PeftModel


@dataclass(frozen=True)
class LayerBeta:
    """One adapted layer.

    Attributes:
        path: of the module.
        depth: index of the block it is in, the last number in its path; None outside any.
        kind: last part of the path, such as "q_proj".
        beta: its scalar.
        sigma_1: largest singular value of the scaffold W (a kernel as a matrix), None if it was not asked for.
    """

    path: str
    depth: int | None
    kind: str
    beta: float
    sigma_1: float | None


@dataclass(frozen=True)
class BetaReport:
    """Betas of one adapter. `print(report)` shows a table, `report.plot()` a figure."""

    layers: tuple[LayerBeta, ...]

    @property
    def betas(self) -> np.ndarray[Any, Any]:
        """Shape `(layers,)`, float64."""
        return np.array([layer.beta for layer in self.layers])

    @property
    def summary(self) -> dict[str, float]:
        """Minimum, quartiles, mean and maximum, and how many betas are not positive."""
        betas = self.betas
        q1, median, q3 = (float(value) for value in np.quantile(betas, [0.25, 0.5, 0.75]))
        return {
            "min": float(betas.min()),
            "q1": q1,
            "median": median,
            "q3": q3,
            "mean": float(betas.mean()),
            "max": float(betas.max()),
            "not_positive": int((betas <= 0).sum()),
        }

    def __str__(self) -> str:
        width = max(len("layer"), *(len(layer.path) for layer in self.layers))
        with_norms = any(layer.sigma_1 is not None for layer in self.layers)
        lines = [f"{'layer':<{width}} {'beta':>9}" + (f" {'sigma_1(W)':>11}" if with_norms else "")]
        for layer in self.layers:
            norm = "" if layer.sigma_1 is None else f" {layer.sigma_1:>11.4f}"
            lines.append(f"{layer.path:<{width}} {layer.beta:>9.4f}{norm}")
        s = self.summary
        lines.append(
            f"{len(self.layers)} betas: min {s['min']:.4f}, quartiles {s['q1']:.4f} {s['median']:.4f} {s['q3']:.4f}, "
            f"mean {s['mean']:.4f}, max {s['max']:.4f}; not positive: {s['not_positive']}"
        )
        return "\n".join(lines)

    def plot(self, path: str | Path | None = None, axes: Axes | None = None) -> Axes:
        """Betas by depth, one colour per kind of layer. Needs matplotlib (`hf-lottalora[plot]`).

        Args:
            path: file to write, its suffix says the format; with None nothing is written.
            axes: to draw into instead of a new figure.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        with drawing(axes, path, "beta, the trained scale of each frozen matrix (starts at 1)") as axes:
            kinds = list(dict.fromkeys(layer.kind for layer in self.layers))
            depths = [index if layer.depth is None else layer.depth for index, layer in enumerate(self.layers)]
            for number, kind in enumerate(kinds):
                shift = 0.14 * (number - (len(kinds) - 1) / 2)
                points = [(d, layer.beta) for d, layer in zip(depths, self.layers, strict=True) if layer.kind == kind]
                xs, ys = [depth + shift for depth, _ in points], [beta for _, beta in points]
                colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
                axes.vlines(xs, 1, ys, color=colour, alpha=0.4, linewidth=2)
                axes.scatter(xs, ys, s=46, label=kind, zorder=3, color=colour, marker=marker)
            axes.axhline(1, color=GREY, linewidth=1, zorder=0)
            axes.set(xlabel="layer", ylabel="beta")
            if len(depths) <= 24:
                axes.set_xticks(sorted(set(depths)))
            axes.margins(y=0.2)
            columns = min(len(kinds), 6)
            axes.legend(frameon=False, ncols=columns, loc="upper center", columnspacing=1.2, handletextpad=0.2)
        return axes


def beta_report(model: PeftModel, adapter_name: str | None = None, spectral_norms: bool = True) -> BetaReport:
    """The betas of an adapter (default: the first active one), in the order of the model.

    Args:
        model: with a LottaLoRA adapter.
        adapter_name: which.
        spectral_norms: compute sigma_1 of each adapted scaffold; seconds for large models.

    Raises:
        ValueError: the model has no LottaLoRA adapter.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from hf_lottalora import LottaLoraConfig
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> model = get_peft_model(net, LottaLoraConfig(seed=42, r=1, target_modules=["0"], modules_to_save=["1"]))
        >>> print(beta_report(model, spectral_norms=False))
        layer      beta
        0        1.0000
        1 betas: min 1.0000, quartiles 1.0000 1.0000 1.0000, mean 1.0000, max 1.0000; not positive: 0
    """
    tuner = tuner_of(model)
    layers = dict(tuner.model.named_modules())
    rows = []
    for path, beta in tuner.get_betas(adapter_name).items():
        layer = layers[path]
        assert isinstance(layer, ScaffoldLayer)
        numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", path)
        norm = spectral_norm(layer.original_weight()) if spectral_norms else None
        rows.append(LayerBeta(path, int(numbers[-1]) if numbers else None, path.rpartition(".")[2], beta, norm))
    return BetaReport(tuple(rows))


def spectral_norm(weight: torch.Tensor) -> float:
    """Largest singular value, a kernel `(O, I, ...)` taken as `(O, I * ...)`."""
    matrix = weight.detach().flatten(1).double().cpu()
    if min(matrix.shape) <= 256:
        return float(torch.linalg.matrix_norm(matrix, 2))
    array = matrix.numpy()
    start = np.ones(min(array.shape)) / math.sqrt(min(array.shape))  # else SciPy draws from NumPy's global state
    return float(svds(array, k=1, v0=start, return_singular_vectors=False)[0])


class BetaCallback(TrainerCallback):
    """Logs min, median and max of the betas whenever a Trainer logs: `Trainer(..., callbacks=[BetaCallback()])`.

    So they are in the Trainer's log, its history and its checkpoints' `trainer_state.json`. Trainer calls the reporters
    of `report_to` before any callback: for them it takes `trainer.add_callback(BetaCallback(trainer))`.

    Args:
        trainer: whose `log` is used instead, so that all of its reporters get them.
    """

    def __init__(self, trainer: Trainer | None = None) -> None:
        self.trainer = trainer
        self._due = False

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Called by Trainer.

        Raises:
            ValueError: the model has no LottaLoRA adapter.
        """
        tuner_of(model)
        if self.trainer is None and args.report_to:
            warnings.warn(
                f"Trainer calls the reporters of report_to={args.report_to} before any callback, so they do not get "
                "the betas; the Trainer's log does. For both, trainer.add_callback(BetaCallback(trainer)).",
                UserWarning,
                stacklevel=2,
            )

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Called by Trainer."""
        self._due = control.should_log
        if self._due and self.trainer is not None:
            self.trainer.log(self._summary(model))

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, logs: Any = None, **kwargs: Any) -> None:
        """Called by Trainer, which has put a copy of `logs` into its history by then."""
        if self._due and self.trainer is None:
            summary = self._summary(model)
            logs.update(summary)
            state.log_history[-1].update(summary)
        self._due = False

    @staticmethod
    def _summary(model: Any) -> dict[str, float]:
        low, median, high = np.quantile(list(tuner_of(model).get_betas().values()), [0, 0.5, 1])
        return {"beta_min": float(low), "beta_median": float(median), "beta_max": float(high)}
