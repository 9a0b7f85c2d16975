"""From files to a model that is ready: an artifact against a dense checkpoint, and against building a model anew.

A Llama of the paper's 900M scale in bfloat16, r = 8 on all linear layers. Every way runs in a fresh process, from after
the imports to a model on which `forward` can be called; each repeat runs all, every second time in the other order.

- `artifact, dense`, `packed`, `streamed`: `AutoLottaLoraModelForCausalLM.from_pretrained`; not dense: 1 bit a weight;
- `checkpoint, mapped`: `from_pretrained` of the same model as dense safetensors, which maps the file;
- `checkpoint, touched`: and reads one value of every page; `checkpoint, copied`: and copies it to memory of its own;
- `checkpoint, cold`: copied, with the file not in the page cache;
- `config + LoRA`: `from_config` and `get_peft_model(LoraConfig)`.

Memory is peak and final RSS above that before the model, in a fresh process too.

    python benchmarks/perf/ready.py                    # 900M: some minutes and 6 GB of memory
    python benchmarks/perf/ready.py --scale 30M --repeats 3
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from shared import RESULTS, SCALES, build, in_fresh_process, memory, ratio, record
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM

from hf_lottalora import AutoLottaLoraModelForCausalLM

WAYS = (
    "artifact, dense",
    "artifact, packed",
    "artifact, streamed",
    "checkpoint, mapped",
    "checkpoint, touched",
    "checkpoint, copied",
    "checkpoint, cold",
    "config + LoRA",
)


def prepare(scale: str, folder: Path) -> None:
    """Write the artifacts and the checkpoint."""
    for family, name in (("normal", "dense"), ("binary", "binary")):
        model = build(
            "ours", scale, torch.bfloat16, family=family, embeddings="train", norms="train", residency="streamed"
        )
        model.save_pretrained(folder / name)
    build("full", scale, torch.bfloat16).save_pretrained(folder / "checkpoint")


def load(way: str, scale: str, folder: Path) -> Any:
    """One way to get the model."""
    kind, _, how = way.partition(", ")
    if kind == "artifact":
        return AutoLottaLoraModelForCausalLM.from_pretrained(
            folder / ("dense" if how == "dense" else "binary"), residency=how
        )
    if kind != "checkpoint":
        return build("peft", scale, torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(folder / "checkpoint", dtype=torch.bfloat16)
    for parameter in model.parameters():
        if how == "touched":
            parameter.detach().view(-1)[::2048].sum()
        elif how in ("copied", "cold"):
            parameter.data = parameter.data.clone()
    return model


def forget(folder: Path) -> None:
    """Drop the checkpoint from the page cache."""
    for file in (folder / "checkpoint").glob("*.safetensors"):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(way: str, scale: str, folder: Path) -> dict[str, float]:
    """In a fresh process: seconds, and bytes of memory."""
    if way.endswith("cold"):
        forget(folder)
    before = memory("VmRSS")
    start = time.perf_counter()
    model = load(way, scale, folder)
    found = {
        "seconds": time.perf_counter() - start,
        "peak": memory("VmHWM") - before,
        "resident": memory("VmRSS") - before,
    }
    found["held"] = sum(
        p.nbytes for p in {id(p): p for p in model.parameters()}.values() if type(p) is torch.nn.Parameter
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--scale", choices=SCALES, default="900M", help="default: 900M")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="default: all")
    add("--repeats", type=int, default=5, help="default: 5")
    add("--output", default=RESULTS / "ready.json", help="JSON file; other scales in it are kept")
    add("--worker", nargs=2, metavar=("WAY", "FOLDER"), help="used internally: measure one way in this process")
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(args.worker[0], args.scale, Path(args.worker[1]))))
        return
    found: dict[str, list[dict[str, float]]] = {way: [] for way in args.ways}
    with tempfile.TemporaryDirectory() as name:
        prepare(args.scale, Path(name))
        for repeat in tqdm(range(args.repeats), unit="repeat"):
            for way in args.ways[:: -1 if repeat % 2 else 1]:
                found[way].append(in_fresh_process(__file__, "--scale", args.scale, "--worker", way, name))
    times = {way: [one["seconds"] for one in runs] for way, runs in found.items()}
    rows = []
    for way, runs in found.items():
        row: dict[str, Any] = {"way": way, "seconds": statistics.median(times[way])}
        for peer in ("checkpoint, copied", "checkpoint, cold", "config + LoRA"):
            row[f"over {peer}"] = ratio(times, way, peer) if peer in times else ""
        for key in ("peak", "resident"):
            row[f"{key} MiB"] = statistics.median(one[key] for one in runs) / 2**20
        rows.append(row)
    record(args.output, args.scale, rows, repeats=args.repeats)


if __name__ == "__main__":
    main()
