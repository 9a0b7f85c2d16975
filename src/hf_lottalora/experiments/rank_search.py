"""Minimum sufficient rank (paper section 3, finding 3): r*(eps), the smallest r with loss(r) <= loss(full) + eps."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm
from transformers import Trainer

from ..options import is_rank
from .figure import COLOURS, GREY, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FULL = 0  # what the train function gets as rank for the baseline that trains every weight


@dataclass(frozen=True)
class RankSearch:
    """What was found. `print(search)` shows a table, `search.plot()` a figure.

    Attributes:
        rank: r*(eps), None where even the largest rank is not enough.
        epsilon: eps.
        losses: by rank (0 = full training) and seed.
    """

    rank: int | None
    epsilon: float
    losses: dict[int, dict[int, float]]

    def mean(self, rank: int) -> float:
        """Mean loss of a rank over its seeds; 0 for full training."""
        return mean(self.losses[rank].values())

    def __str__(self) -> str:
        bound = self.mean(FULL) + self.epsilon
        lines = [f"{'rank':>6} {'loss':>10} {'std':>8} {'seeds':>5}  enough"]
        for rank in sorted(self.losses):
            values = list(self.losses[rank].values())
            spread = f"{stdev(values):.4f}" if len(values) > 1 else ""
            enough = "" if rank == FULL else "yes" if self.mean(rank) <= bound else "no"
            name = "full" if rank == FULL else str(rank)
            lines.append(f"{name:>6} {mean(values):>10.4f} {spread:>8} {len(values):>5}  {enough}".rstrip())
        found = "none of these ranks is enough" if self.rank is None else f"r* = {self.rank}"
        lines.append(f"{found} for loss <= {bound:.4f} (full + eps = {self.epsilon:g})")
        return "\n".join(lines)

    def plot(self, path: str | Path | None = None, axes: Axes | None = None) -> Axes:
        """Loss by rank with every seed, the bound, and r*. Needs matplotlib (`hf-lottalora[plot]`).

        Args:
            path: file to write, its suffix says the format; with None nothing is written.
            axes: to draw into instead of a new figure.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        with drawing(axes, path, "Minimum sufficient rank") as axes:
            ranks = sorted(rank for rank in self.losses if rank != FULL)
            axes.plot(ranks, [self.mean(rank) for rank in ranks], color=COLOURS[0], marker="o", label="LottaLoRA, mean")
            xs, ys = zip(*((rank, loss) for rank in ranks for loss in self.losses[rank].values()), strict=True)
            axes.scatter(xs, ys, s=14, color=COLOURS[0], alpha=0.4, label="each seed")
            axes.axhline(self.mean(FULL), color=GREY, label="full training")
            axes.axhline(self.mean(FULL) + self.epsilon, color=GREY, linestyle="--", label="full + eps")
            if self.rank is not None:
                axes.axvline(self.rank, color=COLOURS[1], linewidth=6, alpha=0.4, label=f"r* = {self.rank}")
            axes.set_xscale("log", base=2)
            axes.set_xticks(ranks, [str(rank) for rank in ranks])
            axes.set(xlabel="rank", ylabel="loss")
            axes.legend(frameon=False)
        return axes


def minimum_sufficient_rank(
    train: Callable[[int, int], float | Trainer],
    ranks: Iterable[int] = (1, 2, 4, 8, 16, 32),
    epsilon: float = 0.0,
    seeds: Iterable[int] = (0,),
    file: str | os.PathLike[str] | None = None,
    full_loss: float | None = None,
) -> RankSearch:
    """Find r*(eps) by bisection over `ranks`, which takes for granted that a larger rank does not have a larger loss.

    Args:
        train: `train(rank, seed)` trains a model and returns its loss, or a `Trainer` that is then trained and
            evaluated for `eval_loss`. Rank 0 stands for the baseline that trains every weight.
        ranks: candidates, positive.
        epsilon: how much worse than the baseline is still good enough, >= 0.
        seeds: each rank's loss is the mean over these.
        file: JSON file in which every finished run is kept; a search that was interrupted goes on from it.
        full_loss: the baseline's loss, if it is known; `train` is then not called with rank 0.

    Raises:
        ValueError: ranks, seeds or epsilon make no sense, a loss is not finite, or `file` is no record of a search.

    Example:
        >>> search = minimum_sufficient_rank(lambda rank, seed: 1 / (rank or 64), ranks=[1, 2, 4, 8], epsilon=0.3)
        >>> search.rank
        4
    """
    for name, values in (("ranks", ranks), ("seeds", seeds)):
        if not isinstance(values, Iterable):
            raise ValueError(f"{name} must be several integers, such as [1, 2, 4], got {values!r}.")
    ranks, seeds = list(dict.fromkeys(ranks)), list(dict.fromkeys(seeds))
    if not ranks or not all(map(is_rank, ranks)):
        raise ValueError(f"ranks must be positive integers, at least one, got {ranks}.")
    ranks.sort()
    if not seeds:
        raise ValueError("seeds must name at least one seed.")
    if isinstance(epsilon, bool) or not isinstance(epsilon, (int, float)) or not epsilon >= 0:
        raise ValueError(f"epsilon must be >= 0, got {epsilon!r}.")
    if full_loss is not None and not math.isfinite(full_loss):
        raise ValueError(f"full_loss must be a finite number, got {full_loss!r}.")
    if file is not None and not Path(file).absolute().parent.is_dir():
        raise ValueError(f"file {os.fspath(file)!r} is in a folder that does not exist.")
    runs = _read(file)
    losses: dict[int, dict[int, float]] = {}
    if full_loss is not None:
        losses[FULL] = dict.fromkeys(seeds, float(full_loss))

    def loss_of(rank: int) -> float:
        if rank not in losses:
            for seed in seeds:
                key = f"{rank}/{seed}"
                if key not in runs:
                    label = "full training" if rank == FULL else f"rank {rank}"
                    progress.set_description(f"{label}, seed {seed}")
                    runs[key] = _run(train, rank, seed)
                    _write(file, runs)
                progress.update()
            losses[rank] = {seed: runs[f"{rank}/{seed}"] for seed in seeds}
        return mean(losses[rank].values())

    evaluations = (full_loss is None) + len(ranks).bit_length()  # of bisection, at most
    with tqdm(total=len(seeds) * evaluations, unit="run") as progress:
        bound = loss_of(FULL) + epsilon
        low, high = 0, len(ranks)  # ranks[:low] are too small, ranks[high:] are enough
        while low < high:
            middle = (low + high) // 2
            if loss_of(ranks[middle]) <= bound:
                high = middle
            else:
                low = middle + 1
    return RankSearch(ranks[low] if low < len(ranks) else None, epsilon, losses)


def _run(train: Callable[[int, int], Any], rank: int, seed: int) -> float:
    result = train(rank, seed)
    if isinstance(result, Trainer):
        result.train()
        result = result.evaluate()["eval_loss"]
    loss = float(result)
    if not math.isfinite(loss):
        raise ValueError(f"train(rank={rank}, seed={seed}) gave the loss {loss}; expected a finite number.")
    return loss


def _read(file: str | os.PathLike[str] | None) -> dict[str, float]:
    if file is None or not Path(file).exists():
        return {}
    try:
        runs = json.loads(Path(file).read_text(encoding="utf-8"))["losses_by_rank_and_seed"]
        found = {str(key): float(value) for key, value in runs.items()}
        if not all(math.isfinite(loss) for loss in found.values()):
            raise ValueError("a loss is not finite")
        return found
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no record of a rank search; choose another file, or delete it.") from error


def _write(file: str | os.PathLike[str] | None, runs: dict[str, float]) -> None:
    if file is None:
        return
    partial = Path(f"{os.fspath(file)}.partial")
    partial.write_text(json.dumps({"losses_by_rank_and_seed": runs}, indent=2) + "\n", encoding="utf-8")
    partial.replace(file)  # a crash leaves the old file or the new one
