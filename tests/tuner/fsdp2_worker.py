"""Run by test_engines.py under torchrun: training under FSDP2. Writes what each rank has found to a JSON file.

Arguments: a folder; and a checkpoint, to go on from that and do no more.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import engines
from peft import PeftModel, get_peft_model
from tiny import config, llama
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed

import hf_lottalora.scaffold.tensor as drawing
from hf_lottalora.paths import owner_of
from hf_lottalora.residency.virtual_weight import VirtualWeight
from hf_lottalora.scaffold.tensor import ScaffoldTensor

ROWS = [{"input_ids": torch.arange(16) + i, "labels": torch.arange(16) + i} for i in range(32)]
OPTIONS: dict[str, dict[str, Any]] = {
    "dense": {},
    "packed": {"family": "binary", "residency": "packed"},
    "streamed": {"residency": "streamed"},
    "randlora": {"adapter": "randlora"},
    "nola": {"adapter": "nola", "bases": 8},
}


class UntilTheFirstStep(TrainerCallback):
    """Elements that are drawn and bytes that are broadcast from now on."""

    def __init__(self) -> None:
        self.drawn = self.sent = 0
        self.originals = drawing.draw_blocks, dist.broadcast
        drawing.draw_blocks, dist.broadcast = self.draw_blocks, self.broadcast

    def draw_blocks(self, draws: Any, *args: Any, **kwargs: Any) -> None:
        draws = list(draws)
        self.drawn += sum(len(draw.out) for draw in draws)
        self.originals[0](draws, *args, **kwargs)

    def broadcast(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.sent += tensor.nbytes
        return self.originals[1](tensor, *args, **kwargs)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        drawing.draw_blocks, dist.broadcast = self.originals


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    fsdp = {"cpu_ram_efficient_loading": False, **changes.pop("fsdp_config", {})}
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4 // int(os.environ.get("WORLD_SIZE", "1")), "max_steps": 4,
        "learning_rate": 1e-2, "use_cpu": True, "report_to": "none", "logging_steps": 1, "disable_tqdm": True,
        "save_strategy": "no", "fsdp": dist.is_initialized() or "WORLD_SIZE" in os.environ, "fsdp_config": fsdp,
    }  # fmt: skip
    if not settings["fsdp"]:
        settings.pop("fsdp_config")
    return TrainingArguments(str(folder), **{**settings, **changes})


def base_model(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    set_seed(0)
    return llama(vocab_size=200, tie_word_embeddings=False).to(dtype)


def build(dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    return get_peft_model(base_model(dtype), config(task_type="CAUSAL_LM", **options))


def train(folder: Path, resume: str | None = None, options: dict[str, Any] | None = None, **changes: Any) -> Trainer:
    args = arguments(folder, **changes)
    counted = UntilTheFirstStep()
    trainer = Trainer(build(**(options or {})), args, train_dataset=ROWS, callbacks=[counted])
    trainer.counted = counted
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def go_on(folder: Path, artifact: Path) -> list[float]:
    """Losses of training that goes on from an artifact, on however many ranks."""
    args = arguments(folder, max_steps=2)
    model = PeftModel.from_pretrained(base_model(), artifact, is_trainable=True)
    trainer = Trainer(model, args, train_dataset=ROWS)
    trainer.train()
    trainer.model.verify_scaffold(full=True)
    return losses(trainer)


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def highest_loss(folder: Path) -> dict[str, Any]:
    """Of a run that ends with the model of its first step, which it takes for the best."""
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    args = arguments(folder, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True, **every)
    trainer = Trainer(build(), args, train_dataset=ROWS, eval_dataset=ROWS[:8])
    trainer.train()
    found = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return {"losses": found, "at the end": trainer.evaluate()["eval_loss"]}


def refused(folder: Path, **changes: Any) -> str:
    try:
        train(folder, **changes)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "was not refused"


def main() -> None:
    folder, found = Path(sys.argv[1]), {}
    engines.allow_fsdp()
    if len(sys.argv) > 2:  # on another number of ranks
        trainer = train(folder, sys.argv[2], options=OPTIONS["packed"])
        assert isinstance(trainer.model, FSDPModule), "another engine is active"
        (folder / "resumed.json").write_text(json.dumps(losses(trainer)))
        return
    for name, options in OPTIONS.items():
        trainer = train(folder / name, options=options, save_strategy="steps", save_steps=2)
        model: Any = trainer.model
        assert isinstance(model, FSDPModule) and trainer.accelerator.is_fsdp2, "another engine is active"
        parameters = dict(model.named_parameters())
        kinds = {key: type(p.data).__name__ for key, p in parameters.items()}
        plan = model.get_plan()
        drawn = [t for t in plan.tensors if isinstance(t.start if t.role == "trained" else t.base, ScaffoldTensor)]
        live = [getattr(*owner_of(model.base_model.model, tensor.path)) for tensor in drawn]
        shards = sum(p.to_local().numel() for p in live if isinstance(p, DTensor))
        model.verify_scaffold(full=True)
        trainer.save_model(str(folder / name / "saved"))
        again = train(folder / name, str(folder / name / "checkpoint-2"), options=options)
        state, resumed = model.state_dict(), again.model.state_dict()
        same = all(torch.equal(_local(state[key]), _local(resumed[key])) for key in state)
        found[name] = {
            "losses": losses(trainer), "resumed": losses(again), "resumes to the bit": same, "drawn": trainer.counted.drawn,
            "sent": trainer.counted.sent, "shards": shards,
            "A": sum(adapter.r * adapter.in_features for adapter in plan.adapters), "total": plan.total_parameters,
            "whole": sorted(key for key, kind in kinds.items() if kind == VirtualWeight.__name__),
            "sharded": sorted(key for key, kind in kinds.items() if kind == "DTensor"),
        }  # fmt: skip
    found["went on"] = go_on(folder / "went on", folder / "dense" / "checkpoint-2")
    sharded = {"options": OPTIONS["packed"], "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}
    trainer = train(folder / "sharded", save_strategy="steps", save_steps=2, **copy.deepcopy(sharded))
    again = train(folder / "sharded", str(folder / "sharded" / "checkpoint-2"), **copy.deepcopy(sharded))
    found["sharded"] = {"losses": losses(trainer), "resumed": losses(again)}
    found["best"] = highest_loss(folder / "best")
    trainer = train(folder / "kept", options={"redraw": "targets"})
    trainer.save_model(str(folder / "kept" / "saved"))  # whose base one rank alone could not read any more
    half = {"dtype": torch.bfloat16, **OPTIONS["packed"]}
    trainer = train(folder / "half", options=half, bf16=True)
    trainer.model.verify_scaffold(full=True)
    trained = {str(p.dtype) for p in trainer.model.parameters() if p.requires_grad}
    found["half"] = {"losses": losses(trainer), "trained in": sorted(trained)}
    found["half refused"] = refused(folder, options=OPTIONS["packed"], bf16=True)
    found["efficient loading"] = refused(folder, fsdp_config={"cpu_ram_efficient_loading": True})
    found["another seed"] = refused(folder, options={"seed": 5 + dist.get_rank()})
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


if __name__ == "__main__":
    main()
