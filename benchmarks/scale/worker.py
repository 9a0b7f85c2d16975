"""What `engines.py` starts under torchrun: one model, built and trained by HF Trainer on this rank of several.

Every rank writes what it found as JSON into a folder.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "perf"))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "helpers"))

from shared import RANK, VOCABULARY, build, llama_config, memory, paired, ratio, training_step  # isort: skip
import engines as without_accelerators
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import is_deepspeed_available
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from traffic import Traffic
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

EFFICIENT, EMBEDDINGS = "PEFT LoRA, efficient loading", ", trained embeddings"
OURS: dict[str, dict[str, Any]] = {
    "dense": {},
    "packed, 1 bit": {"family": "binary", "residency": "packed"},
    "packed, 4 bit": {"family": "normal_4bit", "residency": "packed"},
}
METHODS = ("full", "PEFT LoRA", EFFICIENT, *OURS, *(name + EMBEDDINGS for name in ("PEFT LoRA", *OURS)))
NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]


def model_for(method: str, scale: str, checkpoint: str) -> nn.Module:
    """Adapters and norms are trained, and embeddings if the name says so; ours has a beta per layer in addition."""
    name = method.removesuffix(EMBEDDINGS)
    if name in OURS:
        embeddings = "train" if name != method else "frozen"
        options = {"embeddings": embeddings, "norms": "train", "task_type": "CAUSAL_LM", **OURS[name]}
        return build("ours", scale, torch.float32, on_meta=True, **options)
    base = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    if name == "full":
        return base
    settings: dict[str, Any] = {"r": RANK, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if name != method:
        return get_peft_model(
            base, LoraConfig(**settings, modules_to_save=[*NORMS, "embed_tokens"], ensure_weight_tying=True)
        )
    return get_peft_model(base, LoraConfig(**settings, modules_to_save=NORMS))


class Watch(TrainerCallback):
    """Memory, seconds and collectives of building and of each step."""

    def __init__(self, traffic: Traffic | None) -> None:
        self.traffic, self.found = traffic, {"steps": []}
        self.resident, self.start, self.cpu = memory("VmRSS"), time.perf_counter(), time.process_time()

    def take(self) -> dict[str, int]:
        return self.traffic.take() if self.traffic else {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.found["steps"]:
            self.found |= {"building": self.take(), "peak_building": memory("VmHWM") - self.resident}
            self.found["cpu_building"] = time.process_time() - self.cpu
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.found["steps"]:
            self.found["first_step_after"] = time.perf_counter() - self.start
            self.found["cpu_first_step"] = time.process_time() - self.cpu
            self.found["peak_first_step"] = memory("VmHWM") - self.resident
        self.found["steps"].append({"seconds": time.perf_counter() - self.began, "bytes": self.take()})


def arguments(engine: str, folder: Path, efficient: bool, batch: int, **settings: Any) -> TrainingArguments:
    """For HF Trainer; made before the model, they say whether shards will follow."""
    if engine == "FSDP2":
        # What accelerate launch sets: transformers' from_pretrained looks at it.
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": str(efficient).lower()}
        settings |= {"fsdp": True, "fsdp_config": {"version": 2, "cpu_ram_efficient_loading": efficient}}
    return TrainingArguments(
        str(folder),
        per_device_train_batch_size=batch,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        logging_steps=1,
        **settings,
    )


def check_engine(engine: str, trainer: Trainer) -> None:
    """accelerate falls back to DDP without a word."""
    wrapped = trainer.model_wrapped
    kind = FSDPModule if engine == "FSDP2" else DistributedDataParallel
    if dist_size() > 1 and not isinstance(wrapped, kind):
        raise RuntimeError(f"Expected {engine}, the model is a {type(wrapped).__name__}.")


def rows_of_tokens(count: int, tokens: int) -> list[dict[str, torch.Tensor]]:
    drawn = torch.randint(0, VOCABULARY, (count, tokens), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in drawn]


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Build and train; with "count" bytes instead of seconds, because counting takes time."""
    engine, method = job["engine"], job["method"]
    batch, steps = job["batch"] // dist_size(), job["steps"]
    args = arguments(
        engine, Path(job["folder"]), method == EFFICIENT, batch, max_steps=steps, learning_rate=job["learning_rate"]
    )
    set_seed(0)
    data = rows_of_tokens(job["batch"], job["tokens"]) * steps
    if is_deepspeed_available():
        import deepspeed  # noqa: F401  # accelerate imports it where it is installed: no part of building a model
    if dist_size() > 1:
        dist.barrier()
    traffic = Traffic() if job.get("count") else None
    watch = Watch(traffic)
    with traffic or nullcontext():
        model = model_for(method, job["scale"], job["checkpoint"])
        trainer = Trainer(model, args, train_dataset=data, callbacks=[watch])
        trainer.train()
    check_engine(engine, trainer)
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        **watch.found,
        "losses": losses,
        "trained_bytes": sum(p.numel() * p.element_size() for p in trained.values()),
        "beta_bytes": sum(p.numel() * p.element_size() for name, p in trained.items() if "beta" in name),
    }


def compare_steps(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a step by two methods under DDP, in turns in this process."""
    accelerator = Accelerator(cpu=True)
    steps = {}
    for method in job["methods"]:
        model = accelerator.prepare(model_for(method, job["scale"], job["checkpoint"]))
        if not isinstance(model, DistributedDataParallel):
            raise RuntimeError(f"Expected DDP, the model is a {type(model).__name__}.")
        steps[method] = training_step(model, job["batch"] // dist_size(), job["tokens"])
    times = paired(steps, job["repeats"])
    return {"seconds": times, "ratio": ratio(times, *job["methods"])}


def dist_size() -> int:
    return int(os.environ["WORLD_SIZE"])


def main() -> None:
    job = json.loads(sys.argv[1])
    without_accelerators.allow_fsdp()
    if "methods" in job:
        found = compare_steps(job)
    elif "in_turn" in job:
        found = {method: train({**job, "method": method})["losses"] for method in job["in_turn"]}
    else:
        found = train(job)
    found["dense_bytes"] = dense_bytes(job["scale"])
    (Path(job["folder"]) / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def dense_bytes(scale: str) -> int:
    """Of all weights in float32, the tied embedding once."""
    with torch.device("meta"):
        return sum(p.nbytes for p in LlamaForCausalLM(llama_config(scale)).parameters())


if __name__ == "__main__":
    main()
