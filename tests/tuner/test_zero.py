"""Training under DeepSpeed: the same model as by one process, no scaffold sent, and nothing missing in the artifact."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zero_worker
from peft import get_peft_model
from safetensors.torch import load_file
from tiny import config, ids
from transformers import Trainer, TrainingArguments

from hf_lottalora import AutoLottaLoraModelForSequenceClassification
from hf_lottalora.artifact.manifest import MANIFEST_KEY

pytestmark = pytest.mark.smoke  # a launch that trains some twenty small models
pytest.importorskip("deepspeed", reason="DeepSpeed is tested with the newest versions alone")

WORKERS = Path(__file__).parent
RANKS = 2
Found = tuple[Path, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def zero(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """The folder of a run on two ranks, and what each has found."""
    folder = tmp_path_factory.mktemp("zero")
    torchrun = [Path(sys.executable).parent / "torchrun", "--standalone", "--nproc_per_node", str(RANKS)]
    command = [*torchrun, WORKERS / "zero_worker.py", folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-6000:]
    return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(RANKS)]


def alone(folder: Path, options: dict[str, Any], of_text: bool = True) -> Trainer:
    """The same training in this process."""
    base = zero_worker.base_model(of_text)
    model = get_peft_model(base, config(task_type="CAUSAL_LM" if of_text else "SEQ_CLS", **options))
    rows = zero_worker.ROWS if of_text else zero_worker.CLASSES
    args = TrainingArguments(
        str(folder), per_device_train_batch_size=4, max_steps=4, learning_rate=1e-2, use_cpu=True, report_to="none",
        logging_steps=1, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=rows)
    trainer.train()
    return trainer


def test_zero_trains_what_one_process_trains(zero: Found, tmp_path: Path) -> None:
    folder, found = zero
    trainers = {name: alone(tmp_path / name, options) for name, options in zero_worker.OPTIONS.items()}
    for mode, name in zero_worker.RUNS:
        for rank in found:
            run = rank[f"{mode} {name}"]
            torch.testing.assert_close(run["losses"], zero_worker.losses(trainers[name]), rtol=1e-4, atol=0)
            assert run["resumed"] == run["losses"] and run["same"]
        trainers[name].save_model(str(tmp_path / name))
        mine = load_file(folder / mode / name / "saved" / "adapter_model.safetensors")
        theirs = load_file(tmp_path / name / "adapter_model.safetensors")
        assert mine.keys() == theirs.keys()
        for key in mine.keys() - {MANIFEST_KEY}:
            torch.testing.assert_close(mine[key], theirs[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("mode", "name"), [run for run in zero_worker.RUNS if run[1] not in ("randlora", "nola")])
def test_a_rank_draws_its_own_runs_and_receives_none(zero: Found, mode: str, name: str) -> None:
    for rank in zero[1]:
        run = rank[f"{mode} {name}"]
        start = run["A"] + run["trained"]
        if name != "dense":  # whole on each rank, and nothing that DeepSpeed knows of
            assert (run["virtual"], run["parts"]) == (run["tensors"], 0) and run["drawn"] == start
        elif mode == "zero2":
            assert (run["virtual"], run["parts"]) == (0, 0) and run["drawn"] == start + run["scaffold"]
        else:
            assert (run["virtual"], run["parts"]) == (0, run["tensors"])
            assert run["drawn"] == start + run["elements"] == start + run["scaffold"] // RANKS
        # What is trained, which ZeRO-3 sends twice.
        assert run["sent"] == rank["zero2 packed"]["all"] * (1 if mode == "zero2" else 2)


@pytest.mark.parametrize(("mode", "name"), zero_worker.BERT_RUNS)
def test_biases_and_what_is_kept_are_in_the_artifact(zero: Found, mode: str, name: str, tmp_path: Path) -> None:
    folder, found = zero
    assert found[0][f"{mode} {name}"]["losses"] == found[1][f"{mode} {name}"]["losses"]
    saved = folder / mode / name / "saved"
    if name == "noisy bert over its base":  # which only the worker had: its digests are recorded
        content = json.loads(bytes(load_file(saved / "adapter_model.safetensors")[MANIFEST_KEY].numpy()))
        assert len(content["kept"]) == 18 and content["kept_bytes"]
        return
    loaded = AutoLottaLoraModelForSequenceClassification.from_pretrained(saved)
    loaded.verify_scaffold(full=True)
    with torch.no_grad():
        logits = loaded.eval()(input_ids=ids()).logits
    torch.testing.assert_close(logits, torch.tensor(found[0][f"{mode} {name}"]["logits"]), rtol=1e-5, atol=1e-6)
    if name == "bert":
        expected = zero_worker.losses(alone(tmp_path, {}, of_text=False))
        torch.testing.assert_close(found[0][f"{mode} {name}"]["losses"], expected, rtol=1e-4, atol=0)


def test_mixed_precision_under_zero(zero: Found) -> None:
    for rank in zero[1]:
        for name in ("dense", "packed"):
            torch.testing.assert_close(
                rank[f"half {name}"]["losses"], rank[f"zero3 {name}"]["losses"], rtol=0.02, atol=0
            )


def test_what_deepspeed_cannot_have_is_refused_on_every_rank(zero: Found) -> None:
    for rank in zero[1]:
        assert rank["quantised"].startswith("DeepSpeed's zero_optimization.zero_quantized_nontrainable_weights is not")
        assert "is a checkpoint of 3 processes, here are 2, and DeepSpeed cannot divide" in rank["of three"]
        assert "Ranks [1] have another scaffold than rank 0, the first tensor is" in rank["another seed"]
