"""`Trainer(push_to_hub=True)` with each strategy: what is on the hub, and the card in which its report is kept."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hub import Hub, card_errors
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import bert, config, ids
from transformers import Trainer, TrainingArguments

from hf_lottalora import AutoLottaLoraModelForSequenceClassification

FILES = {"adapter_config.json", "adapter_model.safetensors", "config.json", "README.md"}
DATA = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": i % 2} for i, row in enumerate(ids(8))]


def trainer(folder: Path, model: PeftModel | None = None, **options: Any) -> Trainer:
    settings = {
        "num_train_epochs": 2, "per_device_train_batch_size": 4, "save_strategy": "epoch", "eval_strategy": "epoch",
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, "push_to_hub": True, "hub_model_id": "user/name",
    }  # fmt: skip
    args = TrainingArguments(str(folder), **{**settings, **options})
    metrics = {"compute_metrics": lambda _: {"accuracy": 0.75}}
    model = model or get_peft_model(bert(), config(task_type="SEQ_CLS"))
    return Trainer(model, args, train_dataset=DATA, eval_dataset=DATA, **metrics)


def card_of(hub: Hub, repo_id: str = "user/name", revision: str = "main") -> tuple[dict[str, Any], str]:
    text = hub.repos[repo_id].files(revision)["README.md"].decode()
    assert not card_errors(text)
    return yaml.safe_load(text.split("---\n")[1]), text


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_strategies(hub: Hub, tmp_path: Path, strategy: str) -> None:
    run = trainer(tmp_path / "out", hub_strategy=strategy, hub_always_push=True)
    run.train()
    run.push_to_hub()
    names = hub.repos["user/name"].files().keys() - {".gitattributes"}
    top = {name for name in names if "/" not in name}
    assert top == FILES | {"training_args.bin"}
    folders = {name.partition("/")[0] for name in names - top}
    expected = {"checkpoint": {"last-checkpoint"}, "all_checkpoints": {"checkpoint-4", "checkpoint-2"}}
    assert folders == expected.get(strategy, set())
    for folder in folders:
        assert {f"{folder}/{name}" for name in FILES} <= names
    for name, content in hub.repos["user/name"].files().items():
        assert not name.endswith("adapter_model.safetensors") or len(content) < 4 * bert().num_parameters()
    again = AutoLottaLoraModelForSequenceClassification.from_pretrained("user/name")
    inputs = {"input_ids": ids()}
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, run.model.eval()(**inputs).logits)
    assert hub.repos["user/name"].files()["README.md"].decode() == (tmp_path / "out" / "README.md").read_text()


def test_the_card(hub: Hub, tmp_path: Path) -> None:
    run = trainer(tmp_path / "out")
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "README.md").write_text("---\nlicense: mit\ntags:\n- mine\n---\nMy words.\n")
    run.train()
    for _ in range(2):
        run.push_to_hub(dataset_tags="glue", dataset="GLUE", dataset_args="sst2", language="en")
        data, text = card_of(hub)
        (entry,) = data["model-index"]
        (result,) = entry["results"]
        assert result["task"]["type"] == "text-classification" and result["dataset"]["type"] == "glue"
        assert [(m["type"], m["value"]) for m in result["metrics"]] == [("accuracy", 0.75)]
        assert data["library_name"] == "peft" and data["pipeline_tag"] == "text-classification"
        assert data["license"] == "mit" and data["datasets"] == ["glue"] and data["metrics"] == ["accuracy"]
        assert set(data["tags"]) >= {"mine", "lottalora", "bert", "generated_from_trainer", "text-classification"}
        assert "base_model" not in data and not any(tag.startswith("base_model") for tag in data["tags"])
        assert text.index("My words.") < text.index("# BertForSequenceClassification over a random scaffold")
        assert 'from_pretrained("user/name")' in text and "| seed | 42 |" in text and "| beta | mean" in text
        for line in ("- Accuracy: 0.75", "- learning_rate: 5e-05", "| Training Loss | Epoch"):
            assert text.count(line) == 1
        assert "More information needed" not in text and "huggingface.co/)" not in text
        assert len(re.findall(r"^### Framework versions$", text, flags=re.MULTILINE)) == 1
        assert text.count("- Datasets ") == text.count("- Tokenizers ") == text.count("- PEFT ") == 1
    run.model.push_to_hub("user/second")
    run.model.save_pretrained(tmp_path / "out")
    assert "- Accuracy: 0.75" in (tmp_path / "out" / "README.md").read_text()
    data, text = card_of(hub, "user/second")
    assert "My words." not in text


def test_a_branch_and_the_folders_name(hub: Hub, tmp_path: Path) -> None:
    from huggingface_hub import HfApi

    HfApi().create_repo("user/out")
    HfApi().create_branch("user/out", branch="other")
    run = trainer(tmp_path / "out", hub_model_id=None, hub_revision="other", num_train_epochs=1)
    run.train()
    run.push_to_hub()
    _, text = card_of(hub, "user/out", "other")
    assert 'from_pretrained("user/out", revision="other")' in text
    assert hub.repos["user/out"].files().keys() == {".gitattributes"}


def test_a_card_without_a_push(tmp_path: Path) -> None:
    run = trainer(tmp_path / "out", push_to_hub=False, hub_model_id=None, num_train_epochs=1)
    run.train()
    run.save_model()
    run.create_model_card(None, "apache-2.0", None, None, None, None, "glue")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "license: apache-2.0" in text and "datasets:\n- glue" in text
    assert 'from_pretrained("path/to/this/folder")' in text
    assert "| 0.75 " in text and "random scaffold" in text and "model_name" not in text
    assert "trained from scratch on" in text


def test_an_adapter_of_another_name(hub: Hub, tmp_path: Path) -> None:
    """Its files are in a folder of that name: the card at the top says so."""
    run = trainer(tmp_path / "out", get_peft_model(bert(), config(task_type="SEQ_CLS"), adapter_name="mine"))
    run.train()
    run.push_to_hub()
    assert {f"mine/{name}" for name in FILES} | {"README.md"} <= hub.repos["user/name"].files().keys()
    data, text = card_of(hub)
    assert 'from_pretrained("user/name", subfolder="mine")' in text and "- Accuracy: 0.75" in text
    assert "base_model" not in data and "lottalora" in data["tags"]


def test_other_methods_have_trainers_card(tmp_path: Path) -> None:
    model = get_peft_model(bert(), LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    run = trainer(tmp_path / "out", model, push_to_hub=False, hub_model_id=None, num_train_epochs=1)
    run.train()
    run.save_model()
    run.create_model_card()
    text = (tmp_path / "out" / "README.md").read_text()
    assert "More information needed" in text and "lottalora" not in text
