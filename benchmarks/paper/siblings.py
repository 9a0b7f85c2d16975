"""LoRA, RandLoRA and NOLA over one backbone, each at its own learning rate: what they reach, train and save.

Tasks, with the networks, data and training of the benchmarks they are named after:

- `mnist`: the medium network over a drawn backbone, all digits;
- `digits`: the same, the digits 5 to 9 alone, over three backbones. `kept` is the network after five epochs of full
  training on the digits 0 to 4, `noisy` the same with the adapted matrices drawn instead (redraw="targets", its biases
  stay), `drawn` as above;
- `sst2`: the 4-layer BERT with embeddings frozen as drawn, one epoch;
- `cifar10`: Plain-20, one seed;
- `wikitext`: the 3M Llama with its tied embeddings trained, 240 steps of 1,024 tokens, one seed; its score is the loss.

Ways: full training; head and betas alone; LoRA; RandLoRA of uniform bases; NOLA with r = 8 and 1-bit bases, the fastest
to draw. B A is scaled by 1 in LoRA and NOLA, by 20 in RandLoRA: the library's defaults, but for LoRA, whose alpha is r
here. For each way, task and backbone the learning rate is the best of 1e-3, 3e-3 and 1e-2 in one short run each (one
epoch; 60 steps of the Llama; 16,000 rows of SST-2), scored on training rows that are held out; while the best is at an
end of what was tried, the next rate beyond is tried too. `--families` adds other distributions of the bases, trained at
the same rates. Test rows are used once per final run.

    python benchmarks/paper/siblings.py                        # hours; finished runs are kept
    python benchmarks/paper/siblings.py --tasks mnist --families
    python benchmarks/paper/siblings.py --tasks mnist --quick  # seconds, to see that it runs
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import hf_lottalora  # noqa: F401  # isort: skip  # first: it registers the method with PEFT
import numpy as np
from cli import FIRST_SEED, mean_and_std, new_parser, parse_common, results_so_far, run_jobs, seeds_of, write_json
from cli import RESULTS as FOLDER
from matplotlib.figure import Figure
from siblings_tasks import FAMILIES, FULL, HEAD, TASKS, WAYS, changed, train
from tqdm.auto import tqdm

RESULTS = FOLDER / "siblings.json"
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
FIRST = (1e-3, 3e-3, 1e-2)
Runs = dict[str, dict[str, Any]]


def rates_to_try(tried: dict[float, float], best: Any, quick: bool = False) -> list[float]:
    """Which learning rates are still to be tried, of scores by rate: none when the best has one on each side."""
    missing = [rate for rate in (FIRST[:1] if quick else FIRST) if rate not in tried]
    if missing or quick:
        return missing
    at = RATES.index(best(tried, key=tried.__getitem__))
    return [rate for rate in RATES[max(at - 1, 0) : at + 2] if rate not in tried]


def scores_by_rate(runs: Runs, case: str) -> dict[float, float]:
    """What was found in the short runs of a task, backbone and way."""
    found = {rate: runs.get(f"{case}/lr={rate:g}") for rate in RATES}
    return {rate: run["score"] for rate, run in found.items() if run}


def chosen_rate(runs: Runs, task: str, backbone: str, way: str) -> float:
    """The best of the rates that were tried; families have that of their way."""
    tried = scores_by_rate(runs, f"{task}/{backbone}/{_without_family(way)}")
    rate: float = TASKS[task].best(tried, key=tried.__getitem__)
    return rate


def _without_family(way: str) -> str:
    return way.rpartition(", ")[0] if way in FAMILIES else way


def cases_of(args: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    """Task, backbone and way of all that is wanted."""
    for task in args.tasks:
        own = TASKS[task].ways + (tuple(FAMILIES) if args.families else ())
        for backbone in TASKS[task].backbones:
            for way in args.ways or own:
                if way == FULL and backbone == "noisy":
                    continue  # the same as that of kept
                if backbone in (args.backbones or [backbone]):
                    yield task, backbone, way


def run_all(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Short runs until each case has its rate, then all seeds."""
    runs, cases = result["runs"], list(cases_of(args))
    short = changed(args, choosing=True)
    while jobs := {
        f"{task}/{backbone}/{way}/lr={rate:g}": (task, way, backbone, FIRST_SEED, changed(short, lr=rate))
        for task, backbone, way in dict.fromkeys((t, b, _without_family(w)) for t, b, w in cases)
        for rate in rates_to_try(scores_by_rate(runs, f"{task}/{backbone}/{way}"), TASKS[task].best, args.quick)
    }:
        _record(jobs, args, result)
    jobs = {}
    for seed in seeds_of(args):
        for task, backbone, way in cases:
            rate = chosen_rate(runs, task, backbone, way)
            if seed - FIRST_SEED < TASKS[task].seeds:
                final = changed(args, choosing=False, lr=rate)
                jobs[f"{task}/{backbone}/{way}/seed={seed}"] = (task, way, backbone, seed, final)
    _record(jobs, args, result)


def _record(jobs: dict[str, tuple[Any, ...]], args: argparse.Namespace, result: dict[str, Any]) -> None:
    jobs = {key: job for key, job in jobs.items() if key not in result["runs"]}
    for key, found in run_jobs(train, jobs, args.workers):
        result["runs"][key] = found
        tqdm.write(f"{key}: {found['score']:.4f}, {found['cpu_seconds']} s of the CPU")
        if args.recorded:
            write_json(args.output, result)


def summarise(runs: Runs, task: str, backbone: str) -> Runs:
    """By way: the score of each seed, rate, sizes, and how far it is ahead of LoRA of its size, over the same seeds.

    LoRA of that size is read off the line through head and betas (r = 0) and the LoRAs there are, over the logarithm of
    the size; beyond them, it is the nearest.
    """
    rows: Runs = {}
    for way in WAYS:
        start = f"{task}/{backbone}/{way}/seed="
        found = {key.removeprefix(start): run for key, run in runs.items() if key.startswith(start)}
        if found:
            rows[way] = {**next(iter(found.values())), "scores": {seed: run["score"] for seed, run in found.items()}}
    line = [row for way, row in rows.items() if way == HEAD or way.startswith("LoRA")]
    for way, row in rows.items():
        if way.startswith(("RandLoRA", "NOLA")):
            for name, size in _SIZES.items():
                smaller = sorted((one for one in line if size(one) <= size(row)), key=size)
                larger = sorted((one for one in line if size(one) > size(row)), key=size)
                near = smaller[-1:] + larger[:1]
                seeds = [seed for seed in row["scores"] if all(seed in one["scores"] for one in near)]
                if near and seeds:
                    points = zip(*((np.log(size(one)), _mean(one, seeds)) for one in near), strict=True)
                    row[f"by {name}"] = _mean(row, seeds) - float(np.interp(np.log(size(row)), *points))
    return rows


_SIZES: dict[str, Any] = {"parameters": lambda row: row["trained"], "bytes": lambda row: row["bytes"]["exact"]}


def _mean(row: dict[str, Any], seeds: Any = None) -> float:
    return mean(row["scores"][seed] for seed in seeds or row["scores"])


def table(runs: Runs, task: str, backbone: str) -> str:
    """The ways on one backbone, as Markdown."""
    rows = summarise(runs, task, backbone)
    lines = [
        f"| {task}, {backbone} backbone | s | rate | trained | file, bytes: exact | float16 | int8 "
        f"| {TASKS[task].measure} | over LoRA of as many parameters | of as many bytes | seeds |",
        "|---|" + "---:|" * 10,
    ]
    for way, row in rows.items():
        sizes = " | ".join(
            f"{row['bytes'][kind]:,}" if kind in row["bytes"] else "" for kind in ("exact", "float16", "int8")
        )
        ahead = " | ".join(f"{row[name]:+.2f}" if name in row else "" for name in ("by parameters", "by bytes"))
        scaling = "" if row["scaling"] is None or way == HEAD else f"{row['scaling']:g}"
        lines.append(
            f"| {way} | {scaling} | {row['lr']:g} | {row['trained']:,} | {sizes} "
            f"| {mean_and_std(list(row['scores'].values()))} | {ahead} | {len(row['scores'])} |"
        )
    return "\n".join(lines)


def rates_table(runs: Runs, task: str, backbone: str) -> str:
    """What each rate gave in the short runs, as Markdown."""
    found = {way: scores_by_rate(runs, f"{task}/{backbone}/{way}") for way in WAYS}
    rates = sorted({rate for scores in found.values() for rate in scores})
    lines = [f"| held-out training rows, {TASKS[task].measure} | {' | '.join(f'{rate:g}' for rate in rates)} |"]
    lines.append("|---|" + "---:|" * len(rates))
    for way, scores in found.items():
        if scores:
            best = TASKS[task].best(scores, key=scores.__getitem__)
            cells = [f"{scores[rate]:.2f}" if rate in scores else "" for rate in rates]
            cells = [f"**{cell}**" if rate == best else cell for rate, cell in zip(rates, cells, strict=True)]
            lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def measured(runs: Runs) -> list[tuple[str, str]]:
    """The tasks and backbones that have final runs."""
    names = dict.fromkeys(tuple(key.split("/")[:2]) for key in runs if "/seed=" in key)
    return [(task, backbone) for task, backbone in names]


def plot(runs: Runs, path: Path) -> None:
    """Score against trained parameters and against bytes, for each task and backbone that was measured."""
    panels = measured(runs)
    figure = Figure(figsize=(10, 3.6 * len(panels)), layout="constrained")
    grid = figure.subplots(len(panels), 2, squeeze=False)
    for (task, backbone), pair in zip(panels, grid, strict=True):
        rows = summarise(runs, task, backbone)
        for axes, (name, size) in zip(pair, _SIZES.items(), strict=True):
            for kind, marker in (("head", "D"), ("LoRA", "o"), ("RandLoRA", "s"), ("NOLA", "^"), ("full", "*")):
                chosen = [row for way, row in rows.items() if way.startswith(kind) and way not in FAMILIES]
                points = [(size(row), _mean(row)) for row in chosen]
                if points:
                    style = "-" if len(points) > 1 else ""
                    axes.plot(*zip(*sorted(points), strict=True), linestyle=style, marker=marker, label=kind)
            axes.set(
                xscale="log", xlabel=f"{name} of what is trained", ylabel=f"{task}, {backbone}: {TASKS[task].measure}"
            )
            axes.grid(alpha=0.3)
    grid[0][0].legend()
    figure.savefig(path, dpi=120)


def parse_args() -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: all")
    add("--ways", nargs="+", choices=WAYS, help="default: those of the task")
    add("--backbones", nargs="+", choices=["drawn", "kept", "noisy"], help="default: those of the task")
    add("--families", action="store_true", help="other distributions of the bases too")
    add("--precision", choices=["bfloat16", "float32"], default="bfloat16", help="of sst2 and cifar10: autocast or not")
    return parse_common(parser, RESULTS, 5, "mnist, glue, cifar10-jpeg, wikitext-2, tokenizers", "few rows")


def main() -> None:
    args = parse_args()
    result = results_so_far(args)
    run_all(args, result)
    for task, backbone in measured(result["runs"]):
        print(table(result["runs"], task, backbone), end="\n\n")
        print(rates_table(result["runs"], task, backbone), end="\n\n")
    if args.recorded:
        plot(result["runs"], args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
