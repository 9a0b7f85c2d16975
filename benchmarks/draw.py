"""Speed of drawing a scaffold against `torch.Tensor.normal_` in place, on the same tensor, in alternating order.

Reports medians of nanoseconds per value and the median of the paired ratios.

    python benchmarks/draw.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from report import environment, write_json

from hf_lottalora import FAMILIES, ScaffoldTensor
from hf_lottalora.scaffold import draw_into


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--values", type=int, default=1 << 25, help="number of values (default: 2**25)")
    parser.add_argument("--repeats", type=int, default=7, help="paired runs per row (default: 7)")
    parser.add_argument("--output", default="benchmarks/results/draw.json", help="JSON file to write")
    arguments = parser.parse_args()
    rows = []
    print("| family | bits | dtype | ns per value | normal_ ns per value | ratio |\n|---|---|---|---|---|---|")
    for dtype in (torch.bfloat16, torch.float32):
        tensor = torch.zeros(arguments.values, dtype=dtype)
        for family in (f for name, f in FAMILIES.items() if name != "zero"):
            spec = ScaffoldTensor("benchmark.weight", (arguments.values,), 42, family.name, 0.02)
            candidates = {"draw": lambda s=spec, t=tensor: draw_into({s: t}), "normal_": tensor.normal_}
            times: dict[str, list[float]] = {name: [] for name in candidates}
            for repeat in range(arguments.repeats):
                for name in sorted(candidates, reverse=bool(repeat % 2)):
                    times[name].append(seconds(candidates[name]))
            per_value = {name: statistics.median(t) / arguments.values * 1e9 for name, t in times.items()}
            ratio = statistics.median(a / b for a, b in zip(times["draw"], times["normal_"], strict=True))
            dtype_name = str(dtype).removeprefix("torch.")
            rows.append({"family": family.name, "bits": family.bits, "dtype": dtype_name, **per_value, "ratio": ratio})
            print(
                f"| {family.name} | {family.bits} | {dtype_name} | {per_value['draw']:.2f} "
                f"| {per_value['normal_']:.2f} | {ratio:.2f} |"
            )
    write_json(arguments.output, {"environment": environment(), "values": arguments.values, "rows": rows})


if __name__ == "__main__":
    main()
