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


@pytest.mark.parametrize(("schedule", "draws"), [("epoch", 2), ("step", 4), ("micro_batch", 8)])
def test_trainer(tmp_path: Path, schedule: Any, draws: int) -> None:
    torch.manual_seed(0)
    model = get_peft_model(Classifier(), config(target_modules=["net.0", "net.2"], modules_to_save=["net.4"]))
    data = [{"x": torch.randn(12), "labels": torch.tensor(i % 3)} for i in range(16)]
    callback = ResampleScaffoldCallback(schedule)
    args = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model=model, args=args, train_dataset=data, callbacks=[callback]).train()  # type: ignore[arg-type]
    assert callback.resampler is not None and callback.resampler.drawn == draws
    model.verify_scaffold(full=True)


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
