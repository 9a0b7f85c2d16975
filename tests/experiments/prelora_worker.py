"""A small ViT with PreLoRA, trained here and, under torchrun by test_prelora.py, on two processes.

As a script: train, resume from checkpoints of every phase, and write what each rank has found to a JSON file.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTConfig, ViTForImageClassification

from hf_lottalora import LottaLoraConfig, PreLoraCallback

STEPS, JOINT, LORA = 16, 6, 10  # of two epochs, and the steps after which phases begin
CHECKPOINTS = {3: "full", 6: "joint", 8: "joint", 10: "lora", 13: "lora"}  # within windows, and at both changes
EVER = (1e6, 1e6)  # thresholds that pass as soon as there are enough windows


def rows(number: int = 64) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(number, 1, 8, 8, generator=generator)
    return [{"pixel_values": image, "labels": at % 3} for at, image in enumerate(images)]


def vit() -> ViTForImageClassification:
    """16 wide, with dropout."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    return ViTForImageClassification(
        ViTConfig(**sizes, **dropout, image_size=8, patch_size=4, num_channels=1, num_labels=3)
    )


class InOrder(Trainer):
    """transformers 5.0 shuffles otherwise after resuming within a second epoch."""

    def _get_train_sampler(self, *args: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Watch(TrainerCallback):
    """What is trained at each step, and what the optimizer holds for it."""

    def __init__(self) -> None:
        self.trained: dict[int, set[str]] = {}
        self.moments: dict[int, int] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.trained[state.global_step] = {name for name, p in model.named_parameters() if p.requires_grad}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        moments = (value for held in optimizer.state.values() for value in held.values())
        self.moments[state.global_step] = sum(m.numel() for m in moments if isinstance(m, torch.Tensor))


def trainer(folder: Path, model: Any = None, callbacks: Any = (), **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 8 // int(os.environ.get("WORLD_SIZE", "1")), "max_steps": STEPS, "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine", "weight_decay": 0.1, "logging_steps": 1, "report_to": "none", "use_cpu": True,
        "disable_tqdm": True, "save_strategy": "no",
    }  # fmt: skip
    args = TrainingArguments(output_dir=str(folder), **{**settings, **options})
    return InOrder(model or vit(), args, train_dataset=rows(), eval_dataset=rows(8), callbacks=list(callbacks))


def prelora(config: LottaLoraConfig | None = None, **settings: Any) -> PreLoraCallback:
    given = {"window": 2, "thresholds": EVER, "ranks": (2, 4), "joint_steps": LORA - JOINT, "rewarmup_steps": 3}
    return PreLoraCallback(config, **{**given, **settings})


def run(folder: Path, resume: Path | None = None, **options: Any) -> tuple[Trainer, PreLoraCallback]:
    """Train to the end; a checkpoint after each step, unless it is resumed from one."""
    save = {} if resume else {"save_strategy": "steps", "save_steps": 1}
    made = trainer(folder, **save, **options)
    callback = prelora().attach(made)
    made.train(resume_from_checkpoint=None if resume is None else str(resume))
    return made, callback


def losses(made: Trainer) -> list[float]:
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def on_all_ranks(found: Any) -> list[Any]:
    results: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(results, found)
    return results


def main() -> None:
    folder = Path(sys.argv[1])
    made, callback = run(folder / "whole")
    assert isinstance(made.model_wrapped, DistributedDataParallel) and dist.get_world_size() == 2
    weights = on_all_ranks({name: value.tolist() for name, value in made.model.state_dict().items()})
    found: dict[str, Any] = {
        "ranks alike": weights[0] == weights[1],
        "losses": losses(made),
        "report": str(callback.report),
        "ranks": callback.report.ranks,
        "phases": [phase.start for phase in callback.report.phases],
        "batches": len(made.get_train_dataloader()),
    }
    for step in CHECKPOINTS:
        resumed, again = run(folder / f"resumed-{step}", folder / "whole" / f"checkpoint-{step}")
        found[f"resumed from {step}"] = [equal(made.model, resumed.model), again.report == callback.report]
    model = callback.peft_model().eval()
    if dist.get_rank() == 0:
        model.save_pretrained(folder / "saved")
    with torch.no_grad():
        found["logits"] = model(torch.stack([row["pixel_values"] for row in rows(8)])).logits.tolist()
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
