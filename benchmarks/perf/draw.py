"""Speed of drawing a scaffold against `torch.Tensor.normal_` in place, on the same tensors, in alternating order.

Reports medians of nanoseconds per value and the median of the paired ratios: for one tensor of 2**25 values in every
family, or with `--scale` for all matrices of a Llama of the paper's scales, whose memory has been written before.

    python benchmarks/perf/draw.py                    # every family, bfloat16 and float32
    python benchmarks/perf/draw.py --scale 900M       # 1.16e9 weights in bfloat16, 16-bit normal and binary
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from shared import RESULTS, SCALES, llama_config, paired, ratio, record
from transformers import LlamaForCausalLM

from hf_lottalora import FAMILIES, ScaffoldTensor
from hf_lottalora.scaffold.tensor import draw_into


def shapes_of(scale: str) -> list[tuple[int, ...]]:
    """Shapes of the matrices of a Llama, without the embedding."""
    with torch.device("meta"):
        model = LlamaForCausalLM(llama_config(scale))
    return [tuple(p.shape) for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]


def measure(
    families: list[str], shapes: list[tuple[int, ...]], dtype: torch.dtype, repeats: int
) -> list[dict[str, Any]]:
    """One row per family."""
    tensors = [torch.zeros(shape, dtype=dtype) for shape in shapes]
    values = sum(tensor.numel() for tensor in tensors)

    def normal() -> None:
        for tensor in tensors:
            tensor.normal_()

    rows = []
    for name in families:
        family = FAMILIES[name]
        specs = {ScaffoldTensor(f"benchmark.{i}.weight", t.shape, 42, name, 0.02): t for i, t in enumerate(tensors)}
        times = paired({"draw": lambda specs=specs: draw_into(specs), "normal_": normal}, repeats)
        per_value = {way: statistics.median(found) / values * 1e9 for way, found in times.items()}
        dtype_name = str(dtype).removeprefix("torch.")
        rows.append({"family": name, "bits": family.bits, "dtype": dtype_name, "values": values, **per_value})
        rows[-1]["ratio"] = ratio(times, "draw", "normal_")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--scale", choices=SCALES, help="all matrices of this Llama instead of one tensor")
    add("--values", type=int, default=1 << 25, help="of the one tensor (default: 2**25)")
    add("--repeats", type=int, default=7, help="paired runs per row (default: 7)")
    add("--output", default=RESULTS / "draw.json", help="JSON file; other settings in it are kept")
    args = parser.parse_args()
    if args.scale:
        rows = measure(["normal", "binary"], shapes_of(args.scale), torch.bfloat16, args.repeats)
    else:
        families = [name for name in FAMILIES if name not in ("zero", "orthogonal", "spectral_radius")]
        rows = [
            row
            for dtype in (torch.bfloat16, torch.float32)
            for row in measure(families, [(args.values,)], dtype, args.repeats)
        ]
    record(args.output, args.scale or f"{args.values} values", rows, repeats=args.repeats)


if __name__ == "__main__":
    main()
