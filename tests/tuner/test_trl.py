"""TRL's trainers over models of ours, with `peft_config=` and with a model that is wrapped already."""

from __future__ import annotations

import math
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from tiny import config, llama, logits, perturb
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from hf_lottalora import AutoLottaLoraModelForCausalLM

SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "max_steps": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "dataloader_pin_memory": False,
    "max_length": 16,
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per letter."""
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", "?", *string.ascii_lowercase])}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def base(tied: bool = True) -> LlamaForCausalLM:
    return llama(pad_token_id=0, tie_word_embeddings=tied)  # padding as the tokenizer says


def trained(tied: bool = True, **options: Any) -> PeftModel:
    model = get_peft_model(base(tied), config(**options, task_type="CAUSAL_LM"))
    perturb(model)
    return model


def dpo(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path, save_steps: int = 500, **more: Any) -> DPOTrainer:
    rows = {"prompt": ["abc", "bca"] * 2, "chosen": ["ddd", "dee"] * 2, "rejected": ["zzy", "yz"] * 2}
    args = DPOConfig(str(folder), save_steps=save_steps, **SETTINGS)
    return DPOTrainer(model, args=args, train_dataset=Dataset.from_dict(rows), processing_class=tokenizer, **more)


def sft(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path, **more: Any) -> SFTTrainer:
    args = SFTConfig(str(folder), **SETTINGS)
    rows = Dataset.from_dict({"text": ["abcabcabc", "bcabcabca"] * 2})
    return SFTTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer, **more)


def losses(run: Any) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def trainable(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def check_saved(run: Any, folder: Path) -> None:
    """The artifact is `default` in its usual layout, and comes back as the model is."""
    run.save_model(str(folder))
    again = AutoLottaLoraModelForCausalLM.from_pretrained(folder)
    state, expected = get_peft_model_state_dict(again), get_peft_model_state_dict(run.model)
    assert state.keys() == expected.keys() and not any("ref" in key or "default" in key for key in state)
    assert all(torch.equal(state[key], expected[key]) for key in state)
    assert torch.equal(logits(again), logits(run.model))


@pytest.mark.parametrize("wrapped", [False, True])
def test_sft(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, wrapped: bool) -> None:
    if wrapped:
        run = sft(trained(), tokenizer, tmp_path)
    else:
        run = sft(base(), tokenizer, tmp_path, peft_config=config(task_type="CAUSAL_LM"))
    before = trainable(run.model)
    assert sum(value.numel() for value in before.values()) == run.model.get_plan().trainable_parameters
    run.train()
    assert losses(run)[1] < losses(run)[0]
    moved = {name for name, value in trainable(run.model).items() if not torch.equal(value, before[name])}
    assert before.keys() - moved <= {name for name in before if not wrapped and "lora_A" in name}  # B is zero at first
    check_saved(run, tmp_path / "saved")


def test_the_card_is_ours(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """TRL's trainers write cards of their own with each checkpoint, over whatever is there."""
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nMy words.\n")
    run = sft(trained(), tokenizer, tmp_path)
    run.train()
    before_weights = (tmp_path / "README.md").read_text()
    assert "My words." in before_weights and "trained with SFT" in before_weights
    for _ in range(2):
        run.save_model(str(tmp_path))
        run.create_model_card(model_name="name", dataset_name="user/rows", tags="mine")
        text = (tmp_path / "README.md").read_text()
        data = ModelCard(text).data
        assert {"mine", "sft", "trl", "lottalora", "llama", "text-generation"} <= set(data.tags)
        assert data.library_name == "peft" and data.license == "mit" and data.datasets == "user/rows"
        assert not {"base_model", "licence"} & {key for key, value in data.to_dict().items() if value}
        for once in (
            "My words.",
            "over a random scaffold",
            "- TRL ",
            "- Datasets ",
            "trained with SFT",
            "vonwerra2020trl",
        ):
            assert text.count(once) == 1, once
        assert "model trained from scratch on the [user/rows]" in text and "Quick start" not in text


OPTIONS: dict[str, dict[str, Any]] = {
    "tied": {},
    "DoRA, decayed": {"use_dora": True, "decay_beta": True},
    "layer norm, frozen beta": {"layer_norm": True, "train_beta": False},
    "frozen embeddings": {"embeddings": "frozen"},
    "adapted embeddings, untied": {"tied": False, "embeddings": "lora", "r": 1},
    "kept": {"redraw": "none", "save_kept": True},
    "packed": {"family": "binary", "residency": "packed"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_dpo_of_a_trained_model_starts_from_itself(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, options: dict[str, Any]
) -> None:
    model = trained(**options)
    before, names = logits(model), trainable(model).keys()
    run = dpo(model.train(), tokenizer, tmp_path)
    assert torch.equal(logits(model), before)
    assert trainable(model).keys() == names and not any(".ref." in name for name in names)
    run.train()
    assert losses(run)[0] == pytest.approx(math.log(2), abs=1e-4) and losses(run)[1] < losses(run)[0]
    assert trainable(model).keys() == names and not torch.equal(logits(model), before)
    check_saved(run, tmp_path / "saved")
    model.set_adapter("ref")  # has stayed what the model was
    assert torch.equal(logits(model), before)


def test_dpo_with_a_config_starts_from_the_untrained_model(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    run = dpo(base(), tokenizer, tmp_path, peft_config=config(task_type="CAUSAL_LM"))
    run.train()
    assert losses(run)[0] == pytest.approx(math.log(2), abs=1e-4) and losses(run)[1] < losses(run)[0]
    check_saved(run, tmp_path / "saved")


def test_dpo_resumes(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """With the reference it had, not the model it has become."""
    model = trained()
    before = logits(model)
    whole = dpo(model.train(), tokenizer, tmp_path, save_steps=1)
    whole.train()
    resumed = dpo(trained().train(), tokenizer, tmp_path, save_steps=1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert losses(resumed) == losses(whole)
    resumed.model.set_adapter("ref")
    assert torch.equal(logits(resumed.model), before)
