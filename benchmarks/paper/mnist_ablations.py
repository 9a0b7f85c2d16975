"""The paper's ablations on MNIST (sections 3 and 4), over the network and the training of `mnist.py`.

- `families`: the medium network at r = 8 over each of the paper's 22 families, and ternary;
- `resampling`: static scaffold, or a new one each epoch, each step (two scaffolds, gradients accumulated) or for each
  of four micro-batches, at r = 2, 4, 8; scored over the last scaffold;
- `scaffold`: W = 0 while training (with A and B starting at random), the static one, and the static one removed after
  training, at r = 1, 2, 4, 8;
- `b_init`: B zero or Kaiming uniform, at r = 1, 2, 4, 8;
- `heads`: the head trained whole, or drawn and frozen with an adapter of its own, without or with its bias trained;
- `decay`: weight decay on everything trained, as the paper's setting reads, or on everything but beta, at r = 8.

All with alpha = r, see `mnist.py`. Finished runs are kept, so it can be interrupted and repeated.

    python benchmarks/paper/mnist_ablations.py                              # all of them: hours
    python benchmarks/paper/mnist_ablations.py --only families --seeds 1
    python benchmarks/paper/mnist_ablations.py --quick                      # a minute, to see that it runs
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import mean, median, stdev
from typing import Any

from cli import RESULTS as FOLDER
from cli import new_parser, results_so_far, run_jobs, seeds_of, write_json
from mnist import WIDTHS, Cell, load_data, parse_mnist, run
from tqdm.auto import tqdm

from hf_lottalora import FAMILIES

RESULTS = FOLDER / "mnist_ablations.json"
SCHEDULES: dict[str, tuple[str, int] | None] = {
    "static": None,
    "epoch": ("epoch", 1),
    "step, 2 scaffolds": ("step", 2),
    "4 micro-batches": ("micro_batch", 4),
}
# Test accuracy in percent, as the paper gives it. Families: the worst and the best of them.
PAPER = {
    "families": {8: "96.24-96.44"},
    "resampling": {
        ("static", 2): "92.61", ("static", 4): "95.53", ("static", 8): "96.80",
        ("epoch", 2): "67.96", ("epoch", 4): "89.00", ("epoch", 8): "95.53",
        ("step, 2 scaffolds", 2): "42.46", ("step, 2 scaffolds", 4): "54.94", ("step, 2 scaffolds", 8): "91.19",
        ("4 micro-batches", 2): "41.49", ("4 micro-batches", 4): "47.67", ("4 micro-batches", 8): "56.29",
    },
    "scaffold": {
        ("zero", 1): "82.9", ("zero", 2): "91.0", ("zero", 4): "94.5", ("zero", 8): "96.3",
        ("normal", 1): "85.1-89.3", ("normal", 2): "90.6-92.7", ("normal", 4): "93.6-95.4", ("normal", 8): "95.4-96.8",
        ("removed", 1): "82.6", ("removed", 2): "90.8", ("removed", 4): "94.4", ("removed", 8): "96.3",
    },
    "b_init": {
        ("zeros", 1): "89.40", ("zeros", 2): "92.92", ("zeros", 4): "95.74", ("zeros", 8): "96.94",
        ("kaiming", 1): "70.59", ("kaiming", 2): "90.19", ("kaiming", 4): "94.38", ("kaiming", 8): "96.96",
    },
    "heads": {
        ("full", 1): "89.40", ("full", 2): "92.92", ("full", 4): "95.68", ("full", 8): "96.94",
        ("lora", 1): "87.08", ("lora", 2): "93.01", ("lora", 4): "95.09", ("lora", 8): "97.24",
        ("lora+bias", 1): "88.65", ("lora+bias", 2): "93.10", ("lora+bias", 4): "94.75", ("lora+bias", 8): "97.06",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One row of a table: how the medium network is trained at one rank."""

    name: str
    r: int
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    schedule: tuple[str, int] | None = None
    weight_decay: float = 1e-2

    @property
    def key(self) -> str:
        """Names the run, whichever tables use it."""
        parts = [f"r={self.r}", *(f"{name}={value}" for name, value in sorted(self.options.items()))]
        parts += [f"weight_decay={self.weight_decay}"] if self.weight_decay != 1e-2 else []
        return "/".join([*parts, *([f"{self.schedule[0]}={self.schedule[1]}"] if self.schedule else [])])


def variants(table: str) -> Iterator[Variant]:
    """The rows of a table."""
    if table == "families":
        for family in FAMILIES:
            if family != "zero":
                yield Variant(family, 8, {"family": family})
    elif table == "resampling":
        for r in (2, 4, 8):
            for name, schedule in SCHEDULES.items():
                yield Variant(name, r, {} if schedule else {"family": "normal"}, schedule)
    elif table == "scaffold":
        for r in (1, 2, 4, 8):
            yield Variant("zero", r, {"family": "zero", "init_lora_weights": False})
            yield Variant("normal", r, {"family": "normal"})
    elif table == "heads":
        for r in (1, 2, 4, 8):
            yield Variant("full", r, {"family": "normal"})
            yield Variant("lora", r, {"target_modules": LAYERS, "modules_to_save": None})
            yield Variant("lora+bias", r, {"target_modules": LAYERS, "modules_to_save": ["head.bias"]})
    elif table == "decay":
        for weight_decay in (1e-2, 1e-1):
            literal = {"family": "normal"} if weight_decay == 1e-2 else {"decay_beta": True}
            yield Variant(f"{weight_decay}", 8, literal, weight_decay=weight_decay)
            yield Variant(f"{weight_decay}, not on beta", 8, {"decay_beta": False}, weight_decay=weight_decay)
    else:
        for r in (1, 2, 4, 8):
            yield Variant("zeros", r, {"family": "normal"})
            yield Variant("kaiming", r, {"family": "normal", "init_lora_weights": False})


TABLES = ("families", "resampling", "scaffold", "b_init", "heads", "decay")
SMALLER = ("kaiming_normal", "kaiming_uniform", "spectral_radius")  # families with less than the fan-in scale
LAYERS = [*(f"hidden.{i}" for i in range(len(WIDTHS["medium"]))), "head"]


def rows(table: str, runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Mean and standard deviation of each variant that has runs."""
    found = []
    for variant in variants(table):
        scores = {"": [100 * run["test_accuracy"] for run in runs.get(variant.key, [])]}
        if table == "scaffold" and variant.name == "normal":
            scores["removed"] = [100 * run["test_accuracy_scaffold_off"] for run in runs.get(variant.key, [])]
        betas = [beta for run in runs.get(variant.key, []) for beta in run["betas"].values()]
        for other, values in scores.items():
            name = other or variant.name
            if values:
                paper = PAPER.get(table, {})
                found.append(
                    {
                        "variant": name,
                        "r": variant.r,
                        "mean": mean(values),
                        "std": stdev(values) if len(values) > 1 else None,
                        "seeds": len(values),
                        "paper": paper.get(variant.r) if table == "families" else paper.get((name, variant.r)),
                        "beta_min": min(betas),
                        "beta_median": median(betas),
                    }
                )
    return found


def markdown(table: str, found: list[dict[str, Any]]) -> str:
    """A table as Markdown."""
    lines = [
        f"| {table} | r | test accuracy % | paper % | seeds | beta min / median |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in found:
        score = f"{row['mean']:.2f}" + (f" ± {row['std']:.2f}" if row["std"] is not None else "")
        beta = f"{row['beta_min']:.3f} / {row['beta_median']:.3f}"
        lines.append(f"| {row['variant']} | {row['r']} | {score} | {row['paper'] or ''} | {row['seeds']} | {beta} |")
    if table == "families" and len(found) > 1:
        spreads = []
        for kept in (found, [row for row in found if row["variant"] not in SMALLER]):
            means = [row["mean"] for row in kept]
            spreads.append(f"{max(means) - min(means):.2f}")
        lines.append(f"\nSpread of the means: {spreads[0]} points, {spreads[1]} without {', '.join(SMALLER)}.")
    if table == "decay":
        lines.append(
            f"\nThe schedule alone, without a gradient, takes a decayed beta to {decayed(1e-3, 1e-2, 8440):.3f} and "
            f"{decayed(1e-3, 1e-1, 8440):.3f} here, to {decayed(1e-4, 0.1, 34_429, 200):.2f} in the paper's runs on "
            f"WikiText-103, and to {(1 - 1e-2 * 0.1) ** 500:.3f} in 500 steps at a learning rate of 1e-2 and decay 0.1."
        )
    return "\n".join(lines)


def decayed(lr: float, weight_decay: float, steps: int, warm_up: int = 0) -> float:
    """What AdamW makes of a 1 without a gradient, under a cosine schedule."""
    rates = [lr * step / warm_up for step in range(warm_up)]
    rates += [lr * (1 + math.cos(math.pi * step / (steps - warm_up))) / 2 for step in range(steps - warm_up)]
    return math.prod(1 - rate * weight_decay for rate in rates)


def parse_args() -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--only", nargs="+", choices=TABLES, default=TABLES, help="default: all")
    return parse_mnist(parser, RESULTS)


def main() -> None:
    args = parse_args()
    result = results_so_far(args, preset="medium", alpha="r")
    load_data(args)
    wanted = {variant.key: variant for table in args.only for variant in variants(table)}
    jobs = {}
    for seed in seeds_of(args):
        for key, variant in wanted.items():
            if seed not in {found["seed"] for found in result["runs"].get(key, [])}:
                cell = Cell("medium", "lottalora", variant.r, "r")
                jobs[key, seed] = (cell, seed, args, variant.schedule, variant.options, variant.weight_decay)
    for (key, seed), found in run_jobs(run, jobs, args.workers):
        result["runs"].setdefault(key, []).append(found)
        tqdm.write(f"{key}/seed={seed}: {found['test_accuracy']:.2%}, {found['seconds']} s")
        result["tables"] = {table: rows(table, result["runs"]) for table in TABLES}
        if args.recorded:
            write_json(args.output, result)
    for table in args.only:
        print(markdown(table, rows(table, result["runs"])), end="\n\n")


if __name__ == "__main__":
    main()
