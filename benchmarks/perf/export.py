"""A model as an ordinary checkpoint: time, and memory beside the model.

A Llama of the paper's 900M scale, r = 8 on all linear layers, embeddings trained. Every way runs in a fresh process:

- `merge_and_unload, save_pretrained`: PEFT's and transformers' own way, of a model with a dense scaffold;
- `export_dense, dense`, `export_dense, streamed`: ours, with the scaffold in memory, and drawn a tensor at a time;
- `export_lora, streamed`: a base checkpoint and a LoRA adapter.

Memory is the peak of RSS while it is written, above that of the model before. glibc is told to give memory back when it
is freed (MALLOC_MMAP_THRESHOLD_), or some of what it keeps would be counted too.

    python benchmarks/perf/export.py                    # 900M in bfloat16: some minutes and 4 GB of memory
    python benchmarks/perf/export.py --scale 30M --dtype float32
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from shared import RESULTS, SCALES, build, in_fresh_process, memory, record

from hf_lottalora import export_dense, export_lora

WAYS = ("merge_and_unload, save_pretrained", "export_dense, dense", "export_dense, streamed", "export_lora, streamed")


def measure(way: str, scale: str, dtype: torch.dtype) -> dict[str, Any]:
    """In a fresh process: seconds, and bytes."""
    function, _, residency = way.partition(", ")
    residency = "streamed" if residency == "streamed" else "dense"
    model: Any = build("ours", scale, dtype, embeddings="train", norms="train", residency=residency)
    largest = max(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        before, start = memory("VmRSS"), time.perf_counter()
        if function == "merge_and_unload":
            model.merge_and_unload().save_pretrained(folder)
        else:
            {"export_dense": export_dense, "export_lora": export_lora}[function](model, folder)
        seconds, peak = time.perf_counter() - start, memory("VmHWM") - before
        written = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    return {"way": way, "seconds": seconds, "peak": peak, "largest": largest, "written": written, "before": before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--scale", choices=SCALES, default="900M", help="default: 900M")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the model; default: bfloat16")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="default: all")
    add("--output", default=RESULTS / "export.json", help="JSON file; other scales in it are kept")
    add("--worker", help="used internally: measure one way in this process")
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(args.worker, args.scale, getattr(torch, args.dtype))))
        return
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)  # of the fresh processes
    rows = []
    for way in args.ways:
        found = in_fresh_process(__file__, "--scale", args.scale, "--dtype", args.dtype, "--worker", way)
        rows.append(
            {
                "way": way,
                "seconds": found["seconds"],
                "MiB before": found["before"] / 2**20,
                "MiB above at the peak": found["peak"] / 2**20,
                "largest tensor, MiB": found["largest"] / 2**20,
                "written, MiB": found["written"] / 2**20,
            }
        )
    record(args.output, f"{args.scale} {args.dtype}", rows)


if __name__ == "__main__":
    main()
