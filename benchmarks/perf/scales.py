"""Cost as a model grows: drawing, loading, a training step and its memory, from 3M to 900M parameters, 8B streamed.

Runs `draw.py`, `ready.py` and `training.py` at each scale and `large.py` for 8B where their results are not there yet,
fits cost ~ parameters ** slope to the scales from 30M on, and draws one plot each: `scales.json` and `scales.png`.
Training is in bfloat16 on 4 x 128 tokens (8B: 1 x 512).

    python benchmarks/perf/scales.py              # an hour on two cores, 20 GB of memory for full training at 900M
    python benchmarks/perf/scales.py --plot       # only from the results that are there
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from scipy.stats import linregress
from shared import RESULTS, SCALES, llama_config, read_json, record
from tqdm.auto import tqdm
from transformers import LlamaForCausalLM

from hf_lottalora.experiments.figure import COLOURS, GREY, MARKERS, drawing

# Of each script: its options, and the name of its run at a scale.
COMMANDS: dict[str, tuple[list[str], str]] = {
    "draw": (["--repeats", "5"], "{}"),
    "ready": (["--repeats", "3"], "{}"),
    "training": (["--dtypes", "bfloat16", "--repeats", "2"], "{}/bfloat16/4x128"),
}
LARGE, LARGE_OPTIONS = "32 layers, binary, 512 tokens", ["--tokens", "512"]
MEASURES = {
    "Drawing all matrices": "seconds",
    "From files to a model": "seconds",
    "Training step": "seconds",
    "Peak memory of training": "GiB",
}


def rows_of(script: str, scale: str, results: Path) -> list[dict[str, Any]]:
    """The rows of a run, none where it is missing."""
    runs = (read_json(results / f"{script}.json") or {"runs": {}})["runs"]
    found: dict[str, Any] = runs.get(COMMANDS[script][1].format(scale), {})
    return list(found.get("rows", []))


def costs(scale: str, results: Path) -> Iterable[tuple[str, str, float]]:
    """`(measure, who, cost)` of everything measured at a scale."""
    drawing_, loading, step, peak = MEASURES
    for row in rows_of("draw", scale, results):
        yield drawing_, f"{row['bits']} bit", row["draw"] * row["values"] * 1e-9
        if row["family"] == "normal":
            yield drawing_, "normal_", row["normal_"] * row["values"] * 1e-9
    for row in rows_of("ready", scale, results):
        if row["way"] in ("artifact, dense", "artifact, packed", "checkpoint, copied", "config + LoRA"):
            yield loading, row["way"], row["seconds"]
    for row in rows_of("training", scale, results):
        if row["model"] in ("full", "PEFT LoRA", "dense", "streamed, 1 bit, from meta"):
            yield step, row["model"].removesuffix(", from meta"), row["seconds per step"]
            yield peak, row["model"].removesuffix(", from meta"), row["peak MiB"] / 1024


def size_of(scale: str) -> int:
    """Parameters, the tied embedding once."""
    with torch.device("meta"):
        model = LlamaForCausalLM(llama_config(scale))
    return sum(parameter.numel() for parameter in model.parameters())


def collect(scales: list[str], results: Path) -> dict[str, dict[str, dict[int, float]]]:
    """Cost by measure, who, and parameters."""
    found: dict[str, dict[str, dict[int, float]]] = {measure: {} for measure in MEASURES}
    for scale in scales:
        size = size_of(scale)
        for measure, who, cost in costs(scale, results):
            found[measure].setdefault(who, {})[size] = cost
    large = (read_json(results / "large.json") or {"runs": {}})["runs"].get(LARGE)
    if large:
        step = next(row for row in large["rows"] if row["what"] == "training step")
        _, _, stepping, peak = MEASURES
        found[stepping].setdefault("streamed, 1 bit", {})[large["parameters"]] = step["seconds"]
        found[peak].setdefault("streamed, 1 bit", {})[large["parameters"]] = step["peak_gib"]
    return found


def slope(points: dict[int, float]) -> float | None:
    """Exponent of the power law through the points from 30M parameters on; None for fewer than two."""
    fitted = {size: cost for size, cost in points.items() if size >= 2e7}
    if len(fitted) < 2:
        return None
    return float(linregress([math.log(n) for n in fitted], [math.log(c) for c in fitted.values()]).slope)


def plot(found: dict[str, dict[str, dict[int, float]]], path: Path) -> None:
    figure = Figure(figsize=(11, 8), layout="constrained")
    for axes, (measure, lines) in zip(figure.subplots(2, 2).flat, found.items(), strict=True):
        with drawing(axes, None, measure):
            axes.set(xscale="log", yscale="log", xlabel="parameters", ylabel=MEASURES[measure])
            for (who, points), colour, marker in zip(lines.items(), (*COLOURS, GREY), MARKERS, strict=False):
                fitted = slope(points)
                label = who if fitted is None else f"{who}, slope {fitted:.2f}"
                axes.plot(list(points), list(points.values()), color=colour, marker=marker, label=label)
            if lines:
                axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def run_missing(scales: list[str], results: Path) -> None:
    jobs: list[list[str]] = []
    for scale in scales:
        jobs += [
            [f"{script}.py", "--scale", scale, *options]
            for script, (options, _) in COMMANDS.items()
            if not rows_of(script, scale, results)
        ]
    if LARGE not in (read_json(results / "large.json") or {"runs": {}})["runs"] and scales == list(SCALES):
        jobs.append(["large.py", *LARGE_OPTIONS])
    for job in tqdm(jobs, unit="run"):
        tqdm.write(" ".join(job))
        script, *options = job
        output = results / Path(script).with_suffix(".json").name
        subprocess.run([sys.executable, Path(__file__).with_name(script), "--output", output, *options], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--scales", nargs="+", choices=SCALES, default=list(SCALES), help="default: all, and 8B")
    add("--plot", action="store_true", help="run nothing")
    add("--results", type=Path, default=RESULTS, help="folder of the other scripts' JSON")
    add("--output", type=Path, default=RESULTS / "scales.json", help="JSON file to write, and the plot beside it")
    args = parser.parse_args()
    if not args.plot:
        run_missing(args.scales, args.results)
    found = collect(args.scales, args.results)
    sizes = sorted({size for lines in found.values() for points in lines.values() for size in points})
    rows: list[dict[str, Any]] = []
    for measure, lines in found.items():
        for who, points in lines.items():
            row: dict[str, Any] = {"cost": f"{measure}, {MEASURES[measure]}", "of": who}
            row |= {f"{size / 1e6:,.0f}M": points.get(size, "") for size in sizes}
            fitted = slope(points)
            rows.append({**row, "slope": "" if fitted is None else fitted})
    record(args.output, "parameters", rows)
    plot(found, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
