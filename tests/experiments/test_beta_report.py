from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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


def trainer_of(model: nn.Module, folder: Path, **options: Any) -> Trainer:
    data = [{"input_ids": torch.arange(3, 9), "labels": i % 2} for i in range(8)]
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        logging_steps=2,
        learning_rate=0.1,
        report_to=options.pop("report_to", "none"),
        save_strategy=options.pop("save_strategy", "no"),
        use_cpu=True,
        disable_tqdm=True,
    )
    return Trainer(model=model, args=args, train_dataset=data, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", ["nothing", "the trainer"])
def test_trainer_logs_betas(tmp_path: Path, given: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = get_peft_model(bert(), config(task_type="SEQ_CLS"))
    if given == "nothing":
        trainer = trainer_of(model, tmp_path, callbacks=[BetaCallback()], save_strategy="steps")
    else:
        trainer = trainer_of(model, tmp_path)
        trainer.add_callback(BetaCallback(trainer))
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "beta_median" in entry]
    assert [entry["step"] for entry in logged] == [2, 4]
    summary = beta_report(model, spectral_norms=False).summary
    assert logged[-1]["beta_min"] == pytest.approx(summary["min"])
    assert logged[-1]["beta_max"] == pytest.approx(summary["max"])
    assert logged[0]["beta_max"] != logged[1]["beta_max"]
    assert capsys.readouterr().out.count("beta_median") == 2
    if given == "nothing":
        assert all("loss" in entry for entry in logged)
        saved = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
        assert saved["log_history"][-1] == logged[-1]


def test_reporters_that_do_not_get_betas_are_named(tmp_path: Path) -> None:
    trainer = trainer_of(get_peft_model(bert(), config()), tmp_path, callbacks=[BetaCallback()])
    trainer.args.report_to = ["tensorboard"]
    with pytest.warns(UserWarning, match=r"report_to=\['tensorboard'\] before any callback.*BetaCallback\(trainer\)"):
        trainer.train()


def test_a_model_without_betas_is_refused_before_training(tmp_path: Path) -> None:
    trainer = trainer_of(bert(), tmp_path, callbacks=[BetaCallback()])
    with pytest.raises(ValueError, match="Expected a PeftModel with a LottaLoRA adapter, got BertForSequence"):
        trainer.train()
    assert trainer.state.global_step == 0
