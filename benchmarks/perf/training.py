"""Training, each model in a fresh process: peak memory over PEFT's LoRA, and seconds per step.

r = 8 on all linear layers, AdamW, embeddings and norms frozen in ours as in PEFT's. Memory is the peak RSS of building
and three steps, less the RSS before the model is built. All models are built by `from_config` in memory; those named
"from meta" on the meta device, as `AutoLottaLoraModelFor*` does, so that the dense weights are nowhere.

    python benchmarks/perf/training.py                    # float32 and bfloat16, 4 x 128 tokens
    python benchmarks/perf/training.py --scale 900M --dtypes bfloat16
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import torch
from shared import RESULTS, SCALES, build, in_fresh_process, memory, record, seconds, training_step
from tqdm.auto import tqdm

PACKED, STREAMED = ({"family": "binary", "residency": residency} for residency in ("packed", "streamed"))
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "PEFT LoRA": ("peft", {}),
    "dense": ("ours", {}),
    "packed, 1 bit": ("ours", {**PACKED, "on_meta": False}),
    "packed, 1 bit, from meta": ("ours", PACKED),
    "streamed, 1 bit, from meta": ("ours", STREAMED),
}


def measure(name: str, scale: str, dtype: str, rows: int, tokens: int, steps: int) -> dict[str, float]:
    """Train one model in this process."""
    kind, options = MODELS[name]
    before = memory("VmRSS")
    step = training_step(build(kind, scale, getattr(torch, dtype), **options), rows, tokens)
    times = [seconds(step) for _ in range(steps)]
    return {"seconds": statistics.median(times[1:] or times), "peak": memory("VmHWM") - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--scale", choices=SCALES, default="base", help="default: base")
    add("--rows", type=int, default=4, help="default: 4")
    add("--tokens", type=int, default=128, help="per row (default: 128)")
    add("--dtypes", nargs="+", default=["float32", "bfloat16"], help="default: both")
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    add("--steps", type=int, default=3, help="of each process (default: 3)")
    add("--repeats", type=int, default=3, help="default: 3")
    add("--output", default=RESULTS / "training.json", help="JSON file; other settings in it are kept")
    add("--worker", nargs=2, metavar=("MODEL", "DTYPE"), help="used internally: measure one model in this process")
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(args.worker[0], args.scale, args.worker[1], args.rows, args.tokens, args.steps)))
        return
    sizes = ["--scale", args.scale, "--rows", str(args.rows), "--tokens", str(args.tokens), "--steps", str(args.steps)]
    for dtype in args.dtypes:
        found: dict[str, list[dict[str, float]]] = {name: [] for name in args.models}
        for repeat in tqdm(range(args.repeats), unit="repeat", desc=f"{args.scale} {dtype}"):
            for name in args.models[:: -1 if repeat % 2 else 1]:
                found[name].append(in_fresh_process(__file__, *sizes, "--worker", name, dtype))
        peaks = {name: statistics.median(run["peak"] for run in runs) for name, runs in found.items()}
        rows = []
        for name, runs in found.items():
            row: dict[str, Any] = {"model": name, "peak MiB": peaks[name] / 2**20}
            row["over PEFT LoRA"] = peaks[name] / peaks["PEFT LoRA"] if "PEFT LoRA" in peaks else ""
            row["seconds per step"] = statistics.median(run["seconds"] for run in runs)
            rows.append(row)
        key = f"{args.scale}/{dtype}/{args.rows}x{args.tokens}"
        record(args.output, key, rows, repeats=args.repeats)


if __name__ == "__main__":
    main()
