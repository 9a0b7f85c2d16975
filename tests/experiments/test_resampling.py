"""Resampling: which scaffold each forward pass sees, and that gradients are those of the mean over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from tiny import config, mlp
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_lottalora import ResampleScaffoldCallback, ScaffoldResampler


def model_and_batch() -> tuple[PeftModel, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = get_peft_model(mlp(), config(target_modules=["0", "2"], modules_to_save=["4"], init_lora_weights=False))
    return model, torch.randn(8, 12), torch.randint(0, 3, (8,))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("schedule", ["step", "micro_batch"])
def test_gradients_are_the_mean_over_scaffolds(schedule: Any) -> None:
    model, x, y = model_and_batch()
    resampler = ScaffoldResampler(model, schedule, scaffolds=2)
    seen: list[tuple[int, int]] = []

    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen.append((model.get_plan().seed, len(x)))
        result: torch.Tensor = F.cross_entropy(model(x), y)
        return result

    total = resampler.backward(loss, x, y)
    found = gradients(model)
    assert len({seed for seed, _ in seen}) == 2 and 42 not in dict(seen)
    parts = [(x, y)] * 2 if schedule == "step" else [(x[:4], y[:4]), (x[4:], y[4:])]
    assert [rows for _, rows in seen] == [len(part) for part, _ in parts]
    losses = []
    for (seed, _), (inputs, labels) in zip(seen, parts, strict=True):
        with model.scaffold_seed(seed):
            value = F.cross_entropy(model(inputs), labels) / 2
            value.backward()
            losses.append(value.item())
    expected = gradients(model)
    assert total.item() == pytest.approx(sum(losses))
    assert found.keys() == expected.keys() and all(torch.allclose(found[k], expected[k], atol=1e-7) for k in found)


def test_epochs_and_repeatability() -> None:
    runs = []
    for _ in range(2):
        model, x, y = model_and_batch()
        resampler = ScaffoldResampler(model, "epoch")
        seeds = []
        for _ in range(3):
            resampler.start_epoch()
            for _ in range(2):
                resampler.backward(lambda x, y, m=model: F.cross_entropy(m(x), y), x, y)
                seeds.append(model.get_plan().seed)
        model.verify_scaffold(full=True)
        runs.append(seeds)
    assert runs[0] == runs[1]
    assert runs[0][::2] == runs[0][1::2] and len(set(runs[0])) == 3


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class InOrder(Trainer):
    """transformers 5.0 shuffles otherwise after resuming within a second epoch."""

    def _get_train_sampler(self, *args: Any) -> Any:
        return torch.utils.data.SequentialSampler(ROWS)


ROWS = [{"x": torch.randn(12), "labels": torch.tensor(i % 3)} for i in range(24)]


def trainer(
    folder: Path, schedule: Any, seed: int = 42, callbacks: list[Any] | None = None, **options: Any
) -> tuple[Trainer, PeftModel]:
    """Two epochs of three steps of two micro-batches, with dropout, and a checkpoint after each step."""
    torch.manual_seed(0)
    options = {"save_strategy": "steps", "save_steps": 1, **options}
    targets: dict[str, Any] = {"target_modules": ["net.0", "net.2"], "modules_to_save": ["net.4"]}
    model = get_peft_model(Classifier(), config(seed=seed, adapter_seed=5, lora_dropout=0.1, **targets))
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    callbacks = [ResampleScaffoldCallback(schedule)] if callbacks is None else callbacks
    data: dict[str, Any] = {"train_dataset": ROWS, "eval_dataset": ROWS}
    return InOrder(model=model, args=args, **data, callbacks=callbacks), model


def losses(made: Trainer) -> list[float]:
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def callback_of(made: Trainer) -> ResampleScaffoldCallback:
    (found,) = [c for c in made.callback_handler.callbacks if isinstance(c, ResampleScaffoldCallback)]
    return found


@pytest.mark.parametrize(
    ("schedule", "draws", "restore"),
    [("epoch", 2, False), ("step", 6, False), ("micro_batch", 12, False), ("epoch", 2, True)],
)
def test_resuming_is_going_on_to_the_bit(tmp_path: Path, schedule: Any, draws: int, restore: bool) -> None:
    whole, model = trainer(tmp_path / "whole", schedule)
    whole.train()
    resampler = callback_of(whole).resampler
    assert resampler is not None and resampler.state_dict() == {"seed": 42, "drawn": draws}
    model.verify_scaffold(full=True)
    for step in (2, 3, 4):  # within an epoch, at its end, within the next
        options = {"restore_callback_states_from_checkpoint": restore}
        resumed, other = trainer(tmp_path / f"resumed-{step}", schedule, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert losses(resumed) == losses(whole) and len(losses(whole)) == 6
        resampler = callback_of(resumed).resampler
        assert resampler is not None and resampler.state_dict() == {"seed": 42, "drawn": draws}
        other.verify_scaffold(full=True)
        assert other.get_plan().seed == model.get_plan().seed
        first, second = model.state_dict(), other.state_dict()
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
        with pytest.raises(ValueError, match="Nothing was loaded"):  # as ever, once it has started
            other.load_adapter(tmp_path / "whole" / "checkpoint-1", "default")


def test_what_cannot_be_resumed(tmp_path: Path) -> None:
    trainer(tmp_path / "with", "step")[0].train()
    trainer(tmp_path / "without", "step", callbacks=[])[0].train()
    message = "was not made with one ResampleScaffoldCallback of schedule='{}' and seed={}, but with .* LottaLoraConfig"
    for folder, schedule, seed in (("without", "step", 42), ("with", "epoch", 42), ("with", "step", 7)):
        resumed, _ = trainer(tmp_path / "resumed", schedule, seed)
        checkpoint = tmp_path / folder / "checkpoint-2"
        with pytest.raises(ValueError, match=message.format(schedule, seed)):
            resumed.train(resume_from_checkpoint=str(checkpoint))
    resumed, model = trainer(tmp_path / "resumed", "step", callbacks=[])
    with pytest.raises(ValueError, match=r"belongs to seed \d+, this model's scaffold is drawn from seed 42"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "with" / "checkpoint-2"))
    model.verify_scaffold(full=True)


def test_the_best_model_is_refused_at_the_start(tmp_path: Path) -> None:
    options: dict[str, Any] = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}
    message = "load_best_model_at_end=True does not go with ResampleScaffoldCallback"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, "step", **options)
    late, _ = trainer(tmp_path, "step", callbacks=[], **options)
    late.add_callback(ResampleScaffoldCallback("step"))
    with pytest.raises(ValueError, match=message):
        late.train()
    with pytest.raises(ValueError, match="Expected a PeftModel with a LottaLoRA adapter, got Classifier"):
        args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
        Trainer(model=Classifier(), args=args, callbacks=[ResampleScaffoldCallback("step")])


def test_a_loop_of_ones_own_goes_on_where_it_was() -> None:
    model, *_ = model_and_batch()
    resampler = ScaffoldResampler(model, "epoch")
    start = resampler.state_dict()
    seeds = [resampler.resample() for _ in range(3)]
    other, *_ = model_and_batch()
    again = ScaffoldResampler(other, "epoch")
    again.load_state_dict({"seed": 42, "drawn": 2})
    assert other.get_plan().seed == seeds[1]
    assert again.resample() == seeds[2] and again.state_dict() == resampler.state_dict()
    again.load_state_dict(start)
    assert other.get_plan().seed == 42 and again.resample() == seeds[0]
    other.verify_scaffold(full=True)


def test_bad_schedules() -> None:
    model, x, y = model_and_batch()
    with pytest.raises(ValueError, match=r"schedule must be one of \['epoch', 'step', 'micro_batch'\], got 'batch'"):
        ScaffoldResampler(model, "batch")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="schedule must be one of"):
        ResampleScaffoldCallback("steps")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scaffolds must be a positive integer, got 0"):
        ScaffoldResampler(model, "step", 0)
    with pytest.raises(ValueError, match="has one scaffold at a time"):
        ScaffoldResampler(model, "epoch", 2)
    with pytest.raises(ValueError, match="A batch of 8 rows cannot be split into 9"):
        ScaffoldResampler(model, "micro_batch", 9).backward(lambda x, y: model(x).sum(), x, y)
    with pytest.raises(ValueError, match="Expected a PeftModel with a LottaLoRA adapter, got Sequential"):
        ScaffoldResampler(mlp(), "step")  # type: ignore[arg-type]
