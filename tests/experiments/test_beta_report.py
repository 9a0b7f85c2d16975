from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model
from tiny import bert, config, llama, mlp
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_lottalora import BetaCallback, beta_report
from hf_lottalora.experiments.beta_report import spectral_norm


def with_betas(values: list[float]) -> nn.Module:
    model = get_peft_model(llama(), config())
    for layer, value in zip([m for m in model.modules() if hasattr(m, "lora_beta")], values, strict=True):
        layer.lora_beta["default"].value.data.fill_(value)
    return model


def test_numbers() -> None:
    values = [0.5, 0.9, -0.1, 1.2, 0.8, 1.0, 0.7, 0.6]
    report = beta_report(with_betas(values))
    assert np.allclose(report.betas, values)
    assert [layer.depth for layer in report.layers] == [0] * 4 + [1] * 4
    assert [layer.kind for layer in report.layers] == ["q_proj", "k_proj", "v_proj", "o_proj"] * 2
    assert report.summary["min"] == pytest.approx(-0.1) and report.summary["not_positive"] == 1
    assert report.summary["median"] == pytest.approx(0.75)
    assert (report.summary["q1"], report.summary["q3"]) == pytest.approx(np.quantile(values, [0.25, 0.75]))
    assert "8 betas: min -0.1000, quartiles 0.5750 0.7500 0.9250" in str(report)


def test_spectral_norms_are_those_of_the_scaffold_also_while_merged() -> None:
    model = with_betas([0.5] * 8)
    scaffold = model.get_plan().scaffold
    expected = [
        torch.linalg.svdvals(scaffold[f"{layer.path}.weight"].draw(torch.float64)).max().item()
        for layer in beta_report(model).layers
    ]
    assert [layer.sigma_1 for layer in beta_report(model).layers] == pytest.approx(expected, rel=1e-6)
    model.merge_adapter()
    assert [layer.sigma_1 for layer in beta_report(model).layers] == pytest.approx(expected, rel=1e-6)
    assert all(layer.sigma_1 is None for layer in beta_report(model, spectral_norms=False).layers)


def test_large_matrices_and_kernels() -> None:
    state = np.random.get_state()[1].copy()
    generator = torch.Generator().manual_seed(0)
    large = torch.randn(300, 400, generator=generator)
    assert spectral_norm(large) == pytest.approx(torch.linalg.svdvals(large.double()).max().item(), rel=1e-9)
    kernel = torch.randn(4, 3, 2, 2, generator=generator)
    assert spectral_norm(kernel) == pytest.approx(torch.linalg.svdvals(kernel.flatten(1)).max().item(), rel=1e-5)
    assert np.array_equal(np.random.get_state()[1], state)


def test_plot(tmp_path: Path) -> None:
    axes = beta_report(with_betas([0.5] * 8)).plot(tmp_path / "betas.png")
    assert (tmp_path / "betas.png").read_bytes()[:4] == b"\x89PNG"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    plain = get_peft_model(mlp(), config(target_modules=["0", "2"], modules_to_save=["4"]))
    assert [layer.depth for layer in beta_report(plain).layers] == [0, 2]
    beta_report(plain).plot()


def test_trainer_logs_betas(tmp_path: Path) -> None:
    model = get_peft_model(bert(), config(task_type="SEQ_CLS"))
    data = [{"input_ids": torch.arange(3, 9), "labels": i % 2} for i in range(8)]
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        logging_steps=2,
        learning_rate=0.1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=args, train_dataset=data)  # type: ignore[arg-type]
    trainer.add_callback(BetaCallback(trainer))
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "beta_median" in entry]
    assert [entry["step"] for entry in logged] == [2, 4]
    summary = beta_report(model, spectral_norms=False).summary
    assert logged[-1]["beta_min"] == pytest.approx(summary["min"])
    assert logged[-1]["beta_max"] == pytest.approx(summary["max"])
