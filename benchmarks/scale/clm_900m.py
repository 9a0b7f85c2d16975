"""A Llama of the paper's 900M scale trained on WikiText-2 by `examples/train_clm.py`, saved and loaded again.

With a tokenizer of its own of 32,000 tokens, in float32, r = 8 on the attention, embeddings and norms trained. Each
residency in a fresh process, one after the other, over the same binary scaffold: their losses are the same to the bit.
Another process loads the artifact, and its logits must be those of the model that was trained. Memory is the peak RSS
of each process, libraries, tokenising and evaluation included; seconds are of training alone.

    python benchmarks/scale/clm_900m.py                       # 10 GB of memory; a minute of CPU a step, so hours
    python benchmarks/scale/clm_900m.py --scale 3M --steps 2  # to see that it runs
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "perf"))
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import torch
import train_clm
import training
from shared import memory, read_json, record, seconds
from transformers import TrainerCallback

from hf_lottalora import AutoLottaLoraModelForCausalLM

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "scale" / "clm_900m.json"
SCALES = ("3M", "30M", "300M", "600M", "900M")
RESIDENCIES = ("dense", "packed", "streamed")


def command(scale: str, residency: str, steps: int, data: Path, folder: Path) -> str:
    """Arguments of `train_clm.py`."""
    return (
        f"--config_name {ROOT}/examples/configs/llama-{scale.lower()} --train_tokenizer 32000 --block_size 128 "
        f"--train_file {data}/wikitext-2/train.txt.gz --validation_file {data}/wikitext-2/valid.txt.gz "
        f"--family binary --residency {residency} --lora_r 8 --lora_alpha 16 --do_train --do_eval --max_steps {steps} "
        "--per_device_train_batch_size 4 --per_device_eval_batch_size 4 --max_eval_samples 8 --learning_rate 1e-3 "
        "--lr_scheduler_type constant --weight_decay 0.1 --logging_steps 1 --save_strategy no --report_to none "
        f"--use_cpu --output_dir {folder}"
    )


def probe(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=torch.arange(64)[None]).logits
    return logits


class CpuTime(TrainerCallback):
    """CPU seconds of this process while it trains: what a step costs also on a machine that others use."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.begun = time.process_time()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.seconds = time.process_time() - self.begun


def train(arguments: str, folder: Path) -> dict[str, Any]:
    """In a fresh process: losses, seconds and peak memory; keeps the logits of a few tokens."""
    made: list[Any] = []
    cpu_time = CpuTime()

    def new_trainer(*args: Any, **kwargs: Any) -> Any:
        made.append(training.new_trainer(*args, **kwargs))
        made[0].add_callback(cpu_time)
        return made[0]

    train_clm.new_trainer = new_trainer
    sys.argv = ["train_clm.py", *arguments.split()]
    train_clm.main()
    found = json.loads((folder / "all_results.json").read_text())
    model, state = made[0].model, made[0].state
    peak = memory("VmHWM")
    torch.save(probe(model), folder / "logits.pt")
    return {
        "losses": [entry["loss"] for entry in state.log_history if "loss" in entry],
        "seconds": found["train_runtime"] / state.max_steps,
        "cpu_seconds": cpu_time.seconds / state.max_steps,
        "peak": peak,
        "eval_loss": found["eval_loss"],
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "parameters": model.get_plan().total_parameters,
        "artifact": (folder / "adapter_model.safetensors").stat().st_size,
    }


def load(folder: Path) -> dict[str, Any]:
    """In a fresh process: seconds and peak memory of loading, and whether the logits are those of training."""
    models: list[Any] = []
    duration = seconds(lambda: models.append(AutoLottaLoraModelForCausalLM.from_pretrained(folder)))
    same = torch.equal(probe(models[0]), torch.load(folder / "logits.pt"))
    return {"seconds": duration, "peak": memory("VmHWM"), "same": same}


def in_fresh_process(arguments: str, folder: str) -> dict[str, Any]:
    """What a worker prints in its last line; its progress is seen."""
    command = [sys.executable, __file__, "--worker", arguments, folder]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run(scale: str, residency: str, steps: int, data: Path) -> dict[str, Any]:
    """Train and load in fresh processes.

    Raises:
        RuntimeError: the model that was loaded computes something else.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = command(scale, residency, steps, data, Path(folder))
        found = in_fresh_process(arguments, folder)
        found["load"] = in_fresh_process("", folder)
    if not found["load"]["same"]:
        raise RuntimeError(f"{residency}: the model that was loaded computes something else.")
    return {"steps": steps, **found}


def row(residency: str, found: dict[str, Any]) -> dict[str, Any]:
    cells: dict[str, Any] = {"residency": residency, "steps": found["steps"]}
    cells |= {"first loss": found["losses"][0], "last loss": found["losses"][-1], "validation loss": found["eval_loss"]}
    cells |= {"seconds per step": found["seconds"], "CPU seconds": found["cpu_seconds"]}
    cells |= {"peak MiB": found["peak"] / 2**20, "artifact, MiB": found["artifact"] / 2**20}
    return cells | {"seconds to load": found["load"]["seconds"], "peak MiB, loaded": found["load"]["peak"] / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--scale", choices=SCALES, default="900M", help="default: 900M")
    add("--residencies", nargs="+", choices=RESIDENCIES, default=RESIDENCIES, help="default: all")
    add("--steps", type=int, default=20, help="of each (default: 20)")
    add("--data_dir", type=Path, help="holds wikitext-2 (default: $LOTTALORA_DATA, or ../shared/data)")
    add("--output", type=Path, default=RESULTS, help="JSON file; other scales and residencies in it are kept")
    add("--worker", nargs=2, metavar=("ARGUMENTS", "FOLDER"), help="used internally: one run in this process")
    args = parser.parse_args()
    if args.worker:
        arguments, folder = args.worker[0], Path(args.worker[1])
        print("\n" + json.dumps(train(arguments, folder) if arguments else load(folder)))
        return
    data = args.data_dir or Path(os.environ.get("LOTTALORA_DATA") or "../shared/data")
    if not (data / "wikitext-2" / "train.txt.gz").is_file():
        raise SystemExit(f"{data}/wikitext-2/train.txt.gz not found.")
    key = f"{args.scale}/float32/4x128"
    runs = (read_json(args.output) or {"runs": {}})["runs"].get(key, {"found": {}})["found"]
    for residency in args.residencies:
        runs[residency] = run(args.scale, residency, args.steps, data.resolve())
        for other, found in runs.items():
            both = min(found["steps"], args.steps)
            if found["losses"][:both] != runs[residency]["losses"][:both]:
                raise RuntimeError(f"The losses of {residency} are not those of {other}.")
        rows = [row(name, runs[name]) for name in RESIDENCIES if name in runs]
        record(args.output, key, rows, found=runs)


if __name__ == "__main__":
    main()
