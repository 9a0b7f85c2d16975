"""A model of scale: start-up, memory and communication of Llamas on 8 to 1,024 GPUs, from counted bytes and FLOPs.

**Nothing here was measured on a GPU.** Bytes and memory follow from shapes; the same formulas are compared with what
`engines.py` measured on CPU processes. Seconds are bytes over bandwidths and FLOPs over rates, which are assumptions:
arguments, written into the result. Norms and adapters (r = 8, all linear layers) are trained. The ways:

- `PEFT LoRA, FSDP2`: the first process reads the checkpoint and broadcasts it, accelerate's default; then shards;
- `own shard, FSDP2`: each process draws its shard, 16 bits a weight, which is gathered in each step as LoRA's is;
- `packed 1 bit, DDP`, `4 bits`: each process draws the bits of all weights and keeps them; only gradients are sent.

    python benchmarks/scale/model.py
    python benchmarks/scale/model.py --gpus 8 64 --inter_node 25 --microbatch 4 --output out/model.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "perf"))

import costs
from costs import GB, SHAPES, WAYS, Shape, Way
from matplotlib.figure import Figure
from shared import RANK, RESULTS, SCALES, VOCABULARY, read_json, record

from hf_lottalora.experiments.figure import COLOURS, GREY, MARKERS, drawing

OUTPUT = RESULTS.parent / "scale" / "model.json"
MEASURES = {
    "Start-up, seconds": (costs.start_up, 1),
    "Building, GB of the first process": (costs.building, GB),
    "A step, GB of a GPU": (costs.memory, GB),
    "A step, seconds": (costs.step, 1),
    "A step on a slow network, seconds": (lambda *at: costs.step(*at[:3], slow(at[3])), 1),
}
EMBEDDINGS = ", trained embeddings"
# Engines and methods of engines.py, as ways.
MEASURED = {
    ("FSDP2", "PEFT LoRA, efficient loading"): Way("FSDP2", drawn=False),
    ("FSDP2", "dense"): Way("FSDP2"),
    ("FSDP2", "packed, 1 bit"): Way("FSDP2", 1),
    ("DDP", "PEFT LoRA"): Way("DDP", drawn=False),
    ("DDP", "dense"): Way("DDP"),
    ("DDP", "packed, 1 bit"): Way("DDP", 1),
}


def slow(a: argparse.Namespace) -> argparse.Namespace:
    """The same with the slower network."""
    return argparse.Namespace(**{**vars(a), "inter_node": a.slow_network})


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--gpus", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256, 512, 1024], help="default: 8 to 1,024")
    add("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="default: all")
    add("--node", type=int, default=8, help="GPUs of a node (default: 8)")
    add("--intra_node", type=float, default=350.0, help="GB/s between GPUs of a node (default: 350)")
    add("--inter_node", type=float, default=200.0, help="GB/s into a node, of all its cards (default: 200)")
    add("--slow_network", type=float, default=12.5, help="GB/s into a node, to compare (default: 12.5)")
    add("--latency", type=float, default=20.0, help="microseconds of a hop (default: 20)")
    add("--storage", type=float, default=2.0, help="GB/s at which rank 0 reads a checkpoint (default: 2)")
    add("--tflops", type=float, default=990.0, help="peak of a GPU in the weights' dtype (default: 990)")
    add("--utilisation", type=float, default=0.4, help="share of it that a step reaches (default: 0.4)")
    add("--memory_bandwidth", type=float, default=3350.0, help="GB/s of a GPU's memory (default: 3,350)")
    add("--overlap", type=float, default=0.8, help="share of the arithmetic that hides communication (default: 0.8)")
    add("--draw_base", type=float, default=0.07, help="ns to draw a weight (default: 0.07, two CPU cores, measured)")
    add("--draw_bit", type=float, default=0.05, help="ns for each of its bits (default: 0.05, as above)")
    add("--weight_bytes", type=float, default=2, help="of a frozen weight (default: 2)")
    add("--trained_bytes", type=float, default=4, help="of a trained element, sent and held (default: 4)")
    add("--r", type=int, default=8, help="rank of the adapters on all linear layers (default: 8)")
    add("--train_embeddings", action="store_true", help="default: drawn or loaded, and frozen")
    add("--microbatch", type=int, default=1, help="rows of a GPU in a step (default: 1)")
    add("--tokens", type=int, default=4096, help="of a row (default: 4,096)")
    add("--recompute", action=argparse.BooleanOptionalAction, default=True, help="activations in backward (default)")
    add("--output", type=Path, default=OUTPUT, help="JSON file to write, and the plot beside it")
    return parser


def predicted(way: Way, scale: str, ranks: int, train_embeddings: bool) -> dict[str, float]:
    """Megabytes by the model for what engines.py measures at a scale."""
    layers, width, _, mlp = SCALES[scale]
    shape = Shape(layers, width, width, mlp, VOCABULARY, tied=True)
    a = arguments().parse_args(["--weight_bytes", "4", "--r", str(RANK)])
    a.train_embeddings = train_embeddings
    reduced, ddp = costs.reduced(shape, way, a), way.engine == "DDP"
    found = {
        "broadcast MB": costs.sent_at_start(shape, way, a),
        "all-gather MB a step": costs.gathered(shape, way, a),
        "reduce-scatter MB a step": 0.0 if ddp else reduced,
        "all-reduce MB a step": reduced if ddp else 0.0,
        "peak MB": costs.building(shape, way, ranks, a),
    }
    return {key: value / 1e6 for key, value in found.items()}


def check(measured: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Megabytes by the model beside those measured, and their ratio."""
    for name, run in measured["runs"].items():
        for row in run["rows"] if "shard_mib" in run else ():
            method = row["method"].removesuffix(EMBEDDINGS)
            if (row["engine"], method) not in MEASURED:
                continue
            way = MEASURED[row["engine"], method]
            mine = predicted(way, run["scale"], run["processes"], method != row["method"])
            theirs = {**row, "peak MB": row["peak / shard"] * run["shard_mib"] * 2**20 / 1e6}
            for key, value in mine.items():
                if value > 0.1 or theirs[key] > 0.1:  # else digests, and norms of gradients
                    at = {"at": name, "engine": row["engine"], "method": row["method"], "what": key, "model": value}
                    yield {**at, "measured": theirs[key], "measured / model": theirs[key] / value if value else ""}


def table(measure: str, a: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per shape and number of GPUs, one column per way."""
    function, unit = MEASURES[measure]
    return [
        {"model": name, "GPUs": ranks} | {at: function(SHAPES[name], way, ranks, a) / unit for at, way in WAYS.items()}
        for name in a.shapes
        for ranks in a.gpus
    ]


def plot(a: argparse.Namespace, path: Path) -> None:
    figure = Figure(figsize=(3 * len(a.shapes) + 1, 11), layout="constrained")
    grid = figure.subplots(len(MEASURES), len(a.shapes), squeeze=False)
    for line, (measure, (function, unit)) in zip(grid, MEASURES.items(), strict=True):
        for axes, name in zip(line, a.shapes, strict=True):
            with drawing(axes, None, name if measure == next(iter(MEASURES)) else ""):
                axes.set(xscale="log", xlabel="GPUs", ylabel=measure if name == a.shapes[0] else "")
                for (way, how), colour, marker in zip(WAYS.items(), (GREY, *COLOURS), MARKERS, strict=False):
                    values = [function(SHAPES[name], how, ranks, a) / unit for ranks in a.gpus]
                    size = 8 if colour == GREY else 4  # LoRA's is seen where a line lies on it
                    axes.plot(a.gpus, values, color=colour, marker=marker, markersize=size, label=way)
                axes.set_xticks([8, 64, 512], labels=["8", "64", "512"])
                if function in (costs.start_up, costs.building):
                    axes.set_yscale("log")
                else:
                    axes.set_ylim(bottom=0)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(WAYS), frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    args = arguments().parse_args()
    assumptions = {key: value for key, value in vars(args).items() if key != "output"}
    for measure in MEASURES:
        record(args.output, measure, table(measure, args), assumptions=assumptions)
    measured = read_json(OUTPUT.with_name("engines.json"))
    if measured and measured["runs"]:
        record(args.output, "check", list(check(measured)))
    plot(args, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
