from __future__ import annotations

import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from tiny import bert, config, llama
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_lottalora import AutoLottaLoraModelForCausalLM, RanksAgreeCallback


class Sentences(Dataset[dict[str, torch.Tensor]]):
    """Random token rows; the label says whether the second token is even, so there is something to learn."""

    def __init__(self, rows: int = 48, causal: bool = False) -> None:
        self.ids = torch.randint(3, 99, (rows, 9), generator=torch.Generator().manual_seed(5))
        self.labels = self.ids if causal else self.ids[:, 1] % 2

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


def trainer(
    model: PeftModel, folder: Path, causal: bool = False, optimizers: Any = (None, None), **arguments: Any
) -> Trainer:
    settings = {
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 16,
        "num_train_epochs": 2,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 5,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(str(folder), **{**settings, **arguments}),
        train_dataset=Sentences(causal=causal),
        eval_dataset=Sentences(16, causal=causal),
        callbacks=[RanksAgreeCallback()],
        optimizers=optimizers,
    )


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def state_of(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_resume_is_bit_exact(tmp_path: Path) -> None:
    def build() -> PeftModel:
        torch.manual_seed(0)
        return get_peft_model(bert(), config(lora_dropout=0.1, task_type="SEQ_CLS"))

    whole = trainer(build(), tmp_path / "whole")
    whole.train()
    resumed = trainer(build(), tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert losses(resumed)[-7:] == losses(whole)[-7:] and len(losses(whole)) == 12
    expected, found = state_of(whole.model), state_of(resumed.model)
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    whole.model.verify_scaffold(full=True)


class DiskFullAfter(TrainerCallback):
    """From a step on no file can grow beyond so many bytes, as on a disk that is full."""

    def __init__(self, step: int, size: int) -> None:
        self.step, self.size = step, size

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))


@pytest.mark.parametrize("size", [0, 20_000])
def test_a_full_disk_loses_no_earlier_checkpoint(size: int, tmp_path: Path) -> None:
    def build() -> PeftModel:
        torch.manual_seed(0)
        return get_peft_model(bert(), config(task_type="SEQ_CLS"))

    whole = trainer(build(), tmp_path / "whole")
    whole.train()
    interrupted = trainer(build(), tmp_path / "full", save_total_limit=1)
    interrupted.add_callback(DiskFullAfter(8, size))
    ignored, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises((OSError, RuntimeError, SafetensorError)):  # each library has its own
            interrupted.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    resumed = trainer(build(), tmp_path / "full")
    resumed.train(resume_from_checkpoint=str(tmp_path / "full" / "checkpoint-5"))
    assert losses(resumed)[-7:] == losses(whole)[-7:]


def test_resuming_a_checkpoint_of_another_seed_is_refused(tmp_path: Path) -> None:
    trainer(get_peft_model(bert(), config()), tmp_path / "first", num_train_epochs=1).train()
    other = get_peft_model(bert(), config(seed=43))
    before = state_of(other)
    with pytest.raises(ValueError, match=r"belongs to seed 42, this model's scaffold is drawn from seed 43"):
        trainer(other, tmp_path / "second").train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-5"))
    after = state_of(other)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_load_best_model_at_end(tmp_path: Path) -> None:
    run = trainer(
        get_peft_model(bert(), config()),
        tmp_path,
        eval_strategy="steps",
        eval_steps=5,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        learning_rate=0.05,  # so high that the best checkpoint is not the last
    )
    run.train()
    best = run.state.best_model_checkpoint
    assert best is not None and run.state.best_metric == pytest.approx(run.evaluate()["eval_loss"], abs=1e-6)
    again = PeftModel.from_pretrained(bert(), best)
    found = state_of(run.model)
    assert all(torch.equal(value, found[name]) for name, value in state_of(again).items())


@pytest.mark.parametrize("precision", [{"bf16": True}, {"gradient_checkpointing": True}])
def test_precision_and_checkpointing_options(tmp_path: Path, precision: dict[str, bool]) -> None:
    model = get_peft_model(llama(), config(task_type="CAUSAL_LM"))
    run = trainer(model, tmp_path, causal=True, **precision)
    run.train()
    assert losses(run)[-1] < losses(run)[0]
    model.verify_scaffold(full=True)
    run.save_model(str(tmp_path / "final"))
    again = AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path / "final")
    model = run.accelerator.unwrap_model(model, keep_fp32_wrapper=False).eval()  # accelerate had put autocast around it
    batch = Sentences(2).ids
    with torch.no_grad():
        assert torch.equal(again(batch).logits, model(batch).logits)


def test_everything_planned_is_trained_and_nothing_else_moves(tmp_path: Path) -> None:
    model = get_peft_model(bert(), config(init_lora_weights=False, biases="train"))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = state_of(model)
    trainer(model, tmp_path, save_strategy="no").train()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}
    assert moved <= trainable
    assert trainable - moved <= {"base_model.model.bert.pooler.dense.bias"}  # every other one has moved


def test_trainer_recognises_the_model_and_saves_the_artifact(tmp_path: Path) -> None:
    run = trainer(get_peft_model(bert(), config()), tmp_path, max_steps=1)
    run.train()
    run.save_model()
    names = {file.name for file in tmp_path.iterdir() if file.is_file()}
    assert names >= {"adapter_model.safetensors", "adapter_config.json", "config.json", "README.md"}
    assert not any(name.startswith(("model", "pytorch_model")) for name in names)
