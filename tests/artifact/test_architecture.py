"""Configurations that JSON changes: what is compared is what both sides build."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import shrink
import torch
from peft import PeftModel, get_peft_model
from tiny import config, ids, llama_config, logits, perturb
from transformers import LevitForImageClassification, LlamaConfig, LlamaForCausalLM

from hf_lottalora import AutoLottaLoraModelForCausalLM, AutoLottaLoraModelForImageClassification


def built_with(name: str, derive: Callable[[Any], None]) -> type[LlamaConfig]:
    """A configuration that does something more when it is built; transformers 5.0's were no dataclasses yet."""
    hook = "__post_init__" if hasattr(LlamaConfig, "__post_init__") else "__init__"

    def build(self: LlamaConfig, **kwargs: Any) -> None:
        getattr(LlamaConfig, hook)(self, **kwargs)
        derive(self)

    return type(name, (LlamaConfig,), {hook: build})


def derive(self: Any) -> None:
    """As Moshi and PaliGemma derive values; and an infinity, as Nemotron-H has."""
    self.limits = [math.inf, 0.0]
    self.layer_widths = tuple(range(self.num_hidden_layers))


def count(self: Any) -> None:
    """How often it was built: no file can give that back."""
    self.built = getattr(self, "built", 0) + 1


DerivedConfig, ForgetfulConfig = built_with("DerivedConfig", derive), built_with("ForgetfulConfig", count)


def model_of(kind: type[LlamaConfig], **changes: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(kind(**{**llama_config().to_diff_dict(), **changes}))


def test_infinities_and_derived_values_come_back(tmp_path: Path) -> None:
    model = get_peft_model(model_of(DerivedConfig), config())
    perturb(model)
    model.save_pretrained(tmp_path)
    assert "Infinity" in (tmp_path / "config.json").read_text()
    again = PeftModel.from_pretrained(model_of(DerivedConfig), tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_another_value_is_refused_whether_in_the_file_or_in_the_base(tmp_path: Path) -> None:
    get_peft_model(model_of(DerivedConfig), config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="config.json says rms_norm_eps=1e-06, this model has 0.1. Nothing was loaded"):
        PeftModel.from_pretrained(model_of(DerivedConfig, rms_norm_eps=0.1), tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rms_norm_eps": 0.2}))
    with pytest.raises(ValueError, match="config.json: rms_norm_eps: expected 1e-06, .* found 0.2"):
        PeftModel.from_pretrained(model_of(DerivedConfig), tmp_path)
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": "mistral"}))
    with pytest.raises(ValueError, match="config.json: model_type: expected 'llama', .* found 'mistral'"):
        PeftModel.from_pretrained(model_of(DerivedConfig), tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("attention_dropout", 0.25), ("problem_type", "regression"), ("limits", [{"__float__": "-Infinity"}, 0.0])],
)
def test_what_counts_in_training_only_is_the_files_all_the_same(tmp_path: Path, key: str, value: Any) -> None:
    get_peft_model(model_of(DerivedConfig), config()).save_pretrained(tmp_path)
    if key != "limits":  # a base model may have another
        PeftModel.from_pretrained(model_of(DerivedConfig, **{key: value}), tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(ValueError, match=f"config.json: {key}: expected .*, found "):
        PeftModel.from_pretrained(model_of(DerivedConfig), tmp_path)


def test_what_cannot_come_back_is_said_before_training(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"cannot hold built=1 of this ForgetfulConfig: it comes back as \d"):
        model = get_peft_model(model_of(ForgetfulConfig), config())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(model_of(ForgetfulConfig), tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_a_configuration_that_is_changed_later_is_said_when_it_is_saved(tmp_path: Path) -> None:
    model = get_peft_model(model_of(LlamaConfig), config())
    model.config.pad_token_id = 3
    model.save_pretrained(tmp_path)  # warnings are errors
    model.config.rms_norm_eps = 0.5
    with pytest.warns(UserWarning, match="config.rms_norm_eps was changed from 1e-06 to 0.5 since get_peft_model"):
        model.save_pretrained(tmp_path)


def test_an_ordinary_configuration_says_nothing(tmp_path: Path) -> None:
    model = get_peft_model(model_of(LlamaConfig), config(task_type="CAUSAL_LM"))  # warnings are errors
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path)(ids()).logits, logits(model))


@pytest.mark.parametrize("options", [{"embeddings": "frozen"}, {"embeddings": "lora", "r": 1}, {}])
def test_a_padding_token_that_is_set_later_moves_no_row(options: dict[str, Any], tmp_path: Path) -> None:
    """TRL's trainers set it. The embedding was built without one, and config.json says otherwise by then."""
    base = model_of(LlamaConfig, tie_word_embeddings=False)
    model = get_peft_model(base, config(task_type="CAUSAL_LM", **options))
    assert base.get_input_embeddings().padding_idx is None
    perturb(model)
    base.config.pad_token_id = 5
    model.save_pretrained(tmp_path)
    again = AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    again.verify_scaffold(full=True)
    assert {m.padding_idx for m in again.modules() if isinstance(m, torch.nn.Embedding)} == {None}  # row 5 learns


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_writes_into_its_configuration_when_it_is_built(tmp_path: Path) -> None:
    """LeViT appends to a list there, once more in each model that is built of what was saved."""
    with torch.random.fork_rng():
        base = LevitForImageClassification(shrink.shrunk_config("levit")).eval()
    model = get_peft_model(base, config(r=2)).eval()
    perturb(model)
    model.save_pretrained(tmp_path)
    pixels = next(shrink.batches_of(base))
    again = AutoLottaLoraModelForImageClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**pixels).logits, model(**pixels).logits)
