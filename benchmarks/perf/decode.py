"""Decoding on a CPU: one token through the model, at batch 1, over each way to hold the scaffold.

bfloat16, r = 8 on all linear layers, embeddings and norms frozen. A product with one row reads every weight once, so
dense bfloat16 is bound by memory; packed weights must first be made, and the int4 kernel reads a quarter.

    python benchmarks/perf/decode.py
    python benchmarks/perf/decode.py --scale 300M
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from shared import RESULTS, SCALES, build, paired, ratio, record
from torch import nn

from hf_lottalora.residency.forms import VirtualWeight

BITS = {"binary": 1, "normal_2bit": 2, "normal_4bit": 4, "normal_8bit": 8, "normal": 16}
MODELS = {
    "dense": ("normal", "dense"),
    "int4, 1 bit": ("binary", "int4"),
    **{f"packed, {bits} bit": (family, "packed") for family, bits in BITS.items()},
    "streamed, 1 bit": ("binary", "streamed"),
}


def decoding(model: nn.Module) -> Callable[[], None]:
    """A function that runs one token."""
    model.eval()
    token = torch.tensor([[5]])

    def step() -> None:
        with torch.no_grad():
            model(input_ids=token)

    return step


def held_bytes(model: nn.Module) -> int:
    """Bytes of the frozen scaffold in memory."""
    frozen = {id(p): p for p in model.parameters() if not p.requires_grad}.values()
    held = [(p.words, p.codes) if isinstance(p, VirtualWeight) else (p,) for p in frozen]
    return sum(part.nbytes for parts in held for part in parts if part is not None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--scale", choices=SCALES, default="base", help="default: base")
    add("--repeats", type=int, default=21, help="default: 21")
    add("--output", default=RESULTS / "decode.json", help="JSON file; other scales in it are kept")
    args = parser.parse_args()
    models = {
        name: build("ours", args.scale, torch.bfloat16, family=family, residency=residency)
        for name, (family, residency) in MODELS.items()
    }
    times = paired({name: decoding(model) for name, model in models.items()}, args.repeats)
    dense = held_bytes(models["dense"])
    rows = [
        {
            "scaffold": name,
            "milliseconds": 1e3 * statistics.median(found),
            "over dense": ratio(times, name, "dense"),
            "bytes over dense": held_bytes(models[name]) / dense,
        }
        for name, found in times.items()
    ]
    record(args.output, args.scale, rows, repeats=args.repeats)


if __name__ == "__main__":
    main()
