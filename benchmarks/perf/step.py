"""Time of a training step: LottaLoRA in each residency over PEFT's LoRA and over training every weight.

12 layers, d = 768, MLP 2,048, vocabulary 32,000 tied, r = 8 on all linear layers, AdamW included. Each repeat runs all
models one after the other, every second time in the other order; ratios are medians over the repeats. Embeddings and
norms are frozen in ours, as in PEFT's, but in "trained embeddings", which is LottaLoRA's default. "Compiled" is
`torch.compile(model, fullgraph=True)`, which needs a C++ compiler.

    python benchmarks/perf/step.py                    # float32 and bf16, 4 x 128 tokens: ten minutes on two cores
    python benchmarks/perf/step.py --tokens 512       # 4 x 512, where streaming costs less
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from shared import RESULTS, SCALES, build, paired, ratio, record, training_step

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "PEFT LoRA": ("peft", {}),
    "dense": ("ours", {}),
    "dense, trained embeddings": ("ours", {"embeddings": "train", "norms": "train"}),
    "dense, compiled": ("ours", {}),
    "PEFT LoRA, compiled": ("peft", {}),
    "packed, 1 bit": ("ours", {"family": "binary", "residency": "packed"}),
    "streamed, 1 bit": ("ours", {"family": "binary", "residency": "streamed"}),
    "packed, 16 bits": ("ours", {"residency": "packed"}),
    "streamed, 16 bits": ("ours", {"residency": "streamed"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--scale", choices=SCALES, default="base", help="default: base")
    add("--rows", type=int, default=4, help="default: 4")
    add("--tokens", type=int, default=128, help="per row (default: 128)")
    add("--dtypes", nargs="+", default=["float32", "bfloat16"], help="default: both")
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    add("--repeats", type=int, default=11, help="default: 11")
    add("--output", default=RESULTS / "step.json", help="JSON file; other settings in it are kept")
    args = parser.parse_args()
    for dtype in args.dtypes:
        models: dict[str, Any] = {}
        for name in args.models:
            kind, options = MODELS[name]
            models[name] = build(kind, args.scale, getattr(torch, dtype), **options)
            if name.endswith("compiled"):
                models[name] = torch.compile(models[name], fullgraph=True)
        times = paired({name: training_step(m, args.rows, args.tokens) for name, m in models.items()}, args.repeats)
        rows = []
        for name, found in times.items():
            row = {"model": name, "milliseconds": 1e3 * statistics.median(found)}
            for peer in ("full", "PEFT LoRA", "dense"):
                row[f"over {peer}"] = ratio(times, name, peer) if peer in times else ""
            rows.append(row)
        key = f"{args.scale}/{dtype}/{args.rows}x{args.tokens}"
        record(args.output, key, rows, repeats=args.repeats)


if __name__ == "__main__":
    main()
