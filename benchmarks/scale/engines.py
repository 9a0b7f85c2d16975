"""Several processes: what they send, the memory they need and the seconds until a model trains, beside PEFT's LoRA.

Two processes of one thread each on this machine (or `--processes`), over gloo, under torchrun, with HF Trainer; a Llama
in float32, r = 8 on all linear layers, norms trained. Ours is built without memory for weights; LoRA and full training
load a checkpoint, as they do in practice. "Efficient loading" is accelerate's default for FSDP2: the first process
loads and broadcasts.

- Bytes are counted in a run of their own, on the rank where they are most: what a collective puts together or adds up.
- Peak memory is what building added until the first step begins. The shard is the dense weights' bytes / processes.
- Seconds run from before the model is built to the end of the first step. Repeats alternate the order of the methods.

`--parts steps` compares a training step of packed and dense under DDP, in turns in the same processes; `--parts losses`
the losses of 50 steps on 1, 2 and 4 processes with the same global batch. What the output has is not measured again.

    python benchmarks/scale/engines.py                             # 300M: more than an hour on two cores, 10 GB
    python benchmarks/scale/engines.py --scale 3M --parts losses
    python benchmarks/scale/engines.py --scale 900M --parts engines --repeats 1 --engines FSDP2 --methods "dense"
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "perf"))

from shared import RESULTS, SCALES, build, environment, read_json, record, write_json  # isort: skip
import torch
from tqdm.auto import tqdm
from worker import EFFICIENT, EMBEDDINGS, METHODS, dense_bytes

OUTPUT = RESULTS.parent / "scale" / "engines.json"
MB = 1e6
LOSSES: dict[str, Any] = {"batch": 4, "steps": 50, "tokens": 16, "learning_rate": 5e-3}
STEPS: dict[str, Any] = {"methods": ["packed, 1 bit", "dense"], "engine": "DDP"}


def launch(job: dict[str, Any], processes: int) -> list[dict[str, Any]]:
    """What each rank finds."""
    with tempfile.TemporaryDirectory() as folder:
        torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", str(processes)]
        command = [*torchrun, str(Path(__file__).with_name("worker.py")), json.dumps({**job, "folder": folder})]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-6000:]}")
        return [json.loads((Path(folder) / f"rank{rank}.json").read_text()) for rank in range(processes)]


class Measured:
    """Runs by name, kept in the output file as they finish; one that is there is not run again."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.output, self.scale, self.folder, self.processes = args.output, args.scale, folder, args.processes
        self.at = args.scale + (f" on {args.processes}" if args.processes != 2 else "")
        self.runs: dict[str, list[dict[str, Any]]] = (read_json(self.output) or {}).get("measured", {})

    def get(self, name: str, processes: int | None = None, **job: Any) -> list[dict[str, Any]]:
        name, processes = f"{self.at}/{name}", processes or self.processes
        if name not in self.runs:
            tqdm.write(name)
            self.runs[name] = launch({**job, "scale": self.scale, "checkpoint": self.checkpoint()}, processes)
            result = read_json(self.output) or {"runs": {}}
            result.setdefault("measured", {})[name] = self.runs[name]
            write_json(self.output, result)
        return self.runs[name]

    def has(self, name: str) -> bool:
        return f"{self.at}/{name}" in self.runs

    def repeats(self, name: str) -> list[list[dict[str, Any]]]:
        """Those that were measured."""
        return [self.get(f"{name}/{repeat}") for repeat in range(99) if self.has(f"{name}/{repeat}")]

    def checkpoint(self) -> str:
        """What full training and PEFT's LoRA start from."""
        path = self.folder / self.scale
        if not path.exists():
            build("full", self.scale, torch.float32).save_pretrained(path)
        return str(path)


def engines(measured: Measured, args: argparse.Namespace) -> None:
    """One row per engine and method, of this run and of those before."""
    asked = itertools.product(args.engines, args.methods)
    pairs = [(engine, method) for engine, method in asked if engine == "FSDP2" or method != EFFICIENT]
    job = {"batch": args.processes, "tokens": 16, "learning_rate": 1e-4}
    for engine, method in tqdm(pairs, unit="run", desc="bytes"):
        measured.get(f"{engine}/{method}/bytes", engine=engine, method=method, count=True, steps=2, **job)
    for repeat in tqdm(range(args.repeats), unit="repeat"):
        for engine, method in pairs[:: -1 if repeat % 2 else 1]:
            measured.get(f"{engine}/{method}/{repeat}", engine=engine, method=method, steps=1, **job)
    both = itertools.product(("FSDP2", "DDP"), METHODS)
    rows = [engine_row(measured, *pair) for pair in both if measured.has("/".join(pair) + "/bytes")]
    shard = dense_bytes(args.scale) / args.processes
    facts = {"scale": args.scale, "processes": args.processes, "shard_mib": shard / 2**20}
    record(args.output, f"{args.scale}, {args.processes} processes", rows, **facts)


def engine_row(measured: Measured, engine: str, method: str) -> dict[str, Any]:
    name = f"{engine}/{method}"
    counted, timed = measured.get(f"{name}/bytes"), measured.repeats(name)
    last = [rank["steps"][-1]["bytes"] for rank in counted]
    shard = counted[0]["dense_bytes"] / measured.processes
    row: dict[str, Any] = {"engine": engine, "method": method}
    row["broadcast MB"] = sent([rank["building"] for rank in counted], "broadcast", "scatter")
    for kind in ("all_gather", "reduce_scatter", "all_reduce"):
        row[f"{kind.replace('_', '-')} MB a step"] = sent(last, kind)
    row["trained MB"] = counted[0]["trained_bytes"] / MB
    for key, peak in (("peak / shard", "peak_building"), ("peak to step 1 / shard", "peak_first_step")):
        row[key] = statistics.median(slowest(run, peak) for run in timed or [counted]) / shard
    begun, first = before_training(timed), [slowest(run, "first_step_after") for run in timed]
    peer = measured.repeats(f"FSDP2/{EFFICIENT}")
    peers = before_training(peer), [slowest(run, "first_step_after") for run in peer]
    for key, mine, theirs in (("building", begun, peers[0]), ("to step 1", first, peers[1])):
        pairs = list(zip(mine, theirs, strict=False))  # the same repeats
        row[f"seconds {key}"] = statistics.median(mine) if mine else ""
        row[f"{key} / efficient"] = statistics.median(one / other for one, other in pairs) if pairs else ""
    return {**row, "repeats": len(timed)}


def before_training(runs: list[list[dict[str, Any]]]) -> list[float]:
    """Seconds until the first step begins, of the slowest rank."""
    return [max(rank["first_step_after"] - rank["steps"][0]["seconds"] for rank in run) for run in runs]


def slowest(run: list[dict[str, Any]], key: str) -> float:
    """The largest of all ranks."""
    return max(rank[key] for rank in run)


def sent(ranks: list[dict[str, int]], *kinds: str) -> float:
    """Megabytes of these collectives, on the rank where they are most."""
    return max(sum(found.get(kind, 0) for kind in kinds) for found in ranks) / MB


def steps(measured: Measured, args: argparse.Namespace) -> None:
    """Packed over dense: one training step under DDP."""
    rows = []
    for tokens in args.tokens:
        job = {**STEPS, "batch": args.processes, "tokens": tokens, "repeats": args.step_repeats}
        found = measured.get(f"steps/{tokens}", **job)[0]
        row: dict[str, Any] = {"tokens of each process": tokens}
        row |= {f"{method}, seconds": statistics.median(times) for method, times in found["seconds"].items()}
        rows.append({**row, "ratio": found["ratio"]})
    record(args.output, f"{args.scale}, a step under DDP", rows, repeats=args.step_repeats)


def losses(measured: Measured, args: argparse.Namespace) -> None:
    """Largest relative difference to the losses of one process."""
    methods = [method + EMBEDDINGS for method in ("dense", "packed, 1 bit")]
    job = {**LOSSES, "in_turn": methods}
    alone = measured.get("losses of the same rows/1", 1, engine="DDP", **job)[0]
    rows = []
    for engine, processes in itertools.product(args.engines, (2, 4)):
        found = measured.get(f"losses of the same rows/{processes}/{engine}", processes, engine=engine, **job)[0]
        for method in methods:
            off = [abs(mine / theirs - 1) for mine, theirs in zip(found[method], alone[method], strict=True)]
            row = {"engine": engine, "method": method.removesuffix(EMBEDDINGS), "processes": processes}
            row |= {"first loss": found[method][0], "last loss": found[method][-1]}
            rows.append({**row, "last, off by": off[-1], "any, off by": max(off)})
    record(args.output, f"{args.scale}, losses of {LOSSES['steps']} steps", rows)


PARTS = {"engines": engines, "steps": steps, "losses": losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--scale", choices=SCALES, default="300M", help="default: 300M")
    add("--parts", nargs="+", choices=PARTS, default=["engines", "steps"], help="default: engines steps")
    add("--processes", type=int, default=2, help="on this machine, not for losses (default: 2)")
    add("--engines", nargs="+", choices=["DDP", "FSDP2"], default=["FSDP2", "DDP"], help="default: both")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    add("--repeats", type=int, default=3, help="default: 3")
    add("--tokens", nargs="+", type=int, default=[512], help="of each process, for steps (default: 512)")
    add("--step_repeats", type=int, default=5, help="of each step (default: 5)")
    add("--output", type=Path, default=OUTPUT, help="JSON file; what is in it is not measured again")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measured = Measured(args, Path(folder))
        for part in args.parts:
            PARTS[part](measured, args)
    print(f"\n{environment()['cpu']}, {environment()['cores']} cores")


if __name__ == "__main__":
    main()
