"""On a GPU: drawing over copying, a training step's memory and throughput, and decoding from packed weights.

Four measures, each beside its peer in the same run:

- bytes per second written by drawing a scaffold into device memory, over those of a copy on the device (both ways);
- a training step in bfloat16 with AdamW, 32 x 128 tokens, r = 8 on all linear layers: peak memory, and throughput over
  full training;
- one decoded token at batch 1 from 1-bit packed weights, over dense bfloat16;
- that the weights drawn there are those of the CPU, to the bit.

    python benchmarks/perf/gpu.py                                                  # 900M, minutes
    python benchmarks/perf/gpu.py --device cpu --scale 3M --rows 2 --tokens 8      # to see that it runs
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from shared import RESULTS, SCALES, build, environment, markdown, paired, ratio, read_json, training_step, write_json

from hf_lottalora import ScaffoldTensor
from hf_lottalora.scaffold.tensor import draw_into

MIB_DRAWN = 512


def waited(function: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """The function, and the end of what it started."""

    def run() -> None:
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run


def drawing(device: torch.device, mib: int, repeats: int) -> list[dict[str, Any]]:
    target = torch.zeros(mib * 2**20 // 2, dtype=torch.bfloat16, device=device)
    source = torch.zeros_like(target)
    rows = []
    for family in ("normal", "normal_4bit", "binary"):
        spec = ScaffoldTensor("benchmark.weight", tuple(target.shape), 42, family, 0.02)
        ways = {"draw": lambda spec=spec: draw_into({spec: target}), "copy": lambda: target.copy_(source)}
        times = paired({name: waited(way, device) for name, way in ways.items()}, repeats)
        draw_into({spec: target})
        if not torch.equal(target.cpu(), spec.draw(torch.bfloat16)):
            raise RuntimeError(f"{family}: the weights drawn on {device} are not those of the CPU.")
        speed = {name: mib / 1024 / statistics.median(found) for name, found in times.items()}
        rows.append({"family": family, **{f"{name} GiB/s": value for name, value in speed.items()}})
        # A copy moves each byte twice: read and written.
        rows[-1]["bandwidth of draw over copy"] = ratio(times, "copy", "draw") / 2
    return rows


def training(scale: str, device: torch.device, rows: int, tokens: int, repeats: int) -> list[dict[str, Any]]:
    found = []
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "full": ("full", {}),
        "PEFT LoRA": ("peft", {}),
        "dense": ("ours", {}),
        "packed, 1 bit": ("ours", {"family": "binary", "residency": "packed"}),
        "streamed, 1 bit": ("ours", {"family": "binary", "residency": "streamed"}),
    }
    for name, (kind, options) in kinds.items():
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        step = waited(training_step(build(kind, scale, torch.bfloat16, **options).to(device), rows, tokens), device)
        step()
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
        found.append({"model": name, "tokens/s": rows * tokens / statistics.median(times), "peak GB": peak})
        del step
    for row in found:
        row["throughput over full"] = row["tokens/s"] / found[0]["tokens/s"]
    return found


def decoding(scale: str, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    token = torch.tensor([[5]], device=device)
    models = {
        name: build("ours", scale, torch.bfloat16, **options).to(device).eval()
        for name, options in {
            "dense": {},
            "packed, 1 bit": {"family": "binary", "residency": "packed"},
            "packed, 4 bit": {"family": "normal_4bit", "residency": "packed"},
        }.items()
    }

    def step(name: str) -> None:
        with torch.no_grad():
            models[name](input_ids=token)

    steps: dict[str, Callable[[], object]] = {name: lambda name=name: step(name) for name in models}
    if device.type == "cuda":  # eager, the launches of small kernels would be most of the time
        steps |= {f"{name}, CUDA graph": captured(run).replay for name, run in dict(steps).items()}
    times = paired({name: waited(run, device) for name, run in steps.items()}, repeats)
    rows = []
    for name, found in times.items():
        peer = "dense, CUDA graph" if name.endswith("graph") else "dense"
        rows.append(
            {"model": name, "milliseconds": 1e3 * statistics.median(found), "over dense": ratio(times, name, peer)}
        )
    return rows


def captured(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """The kernels of a step, to be launched together."""
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--scale", choices=SCALES, default="900M", help="default: 900M")
    add("--rows", type=int, default=32, help="default: 32")
    add("--tokens", type=int, default=128, help="per row (default: 128)")
    add("--repeats", type=int, default=11, help="default: 11")
    add("--device", default="cuda", help="default: cuda")
    add("--output", default=RESULTS / "gpu.json", help="JSON file; other scales in it are kept")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device. Pass --device cpu to see that it runs.")
    measures: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "drawing": lambda: drawing(device, MIB_DRAWN if device.type == "cuda" else 1, args.repeats),
        "training": lambda: training(args.scale, device, args.rows, args.tokens, args.repeats),
        "decoding": lambda: decoding(args.scale, device, args.repeats),
    }
    result = read_json(args.output) or {"runs": {}}
    run = {"environment": environment(), "repeats": args.repeats}
    result["runs"][f"{args.scale}/{args.rows}x{args.tokens}/{device.type}"] = run
    for name, measure in measures.items():
        rows = run[name] = measure()
        print(f"\n{name}\n{markdown(rows)}")
        write_json(args.output, result)


if __name__ == "__main__":
    main()
