"""The manifest: one digest that names an artifact, and what it proves of tensors and options."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from tiny import config, llama, logits, perturb

from hf_lottalora import AutoLottaLoraModelForCausalLM


def test_the_card_has_the_digest_that_a_loader_compares(saved: tuple[PeftModel, Path]) -> None:
    model, folder = saved
    digest = re.search(r"\| digest \| `([0-9a-f]{64})` \|", (folder / "README.md").read_text())[1]  # type: ignore[index]
    again = AutoLottaLoraModelForCausalLM.from_pretrained(folder, digest=digest)
    assert torch.equal(logits(again), logits(model))
    other = "0" * 64
    with pytest.raises(
        ValueError, match=f"expected the artifact with digest '{other}', found '{digest}'. Nothing was loaded"
    ):
        AutoLottaLoraModelForCausalLM.from_pretrained(folder, digest=other)
    with pytest.raises(ValueError, match="64 hexadecimal digits, in lower case, .* got 'abc'"):
        AutoLottaLoraModelForCausalLM.from_pretrained(folder, digest="abc")
    perturb(model)
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match=f"expected the artifact with digest '{digest}', found"):
        AutoLottaLoraModelForCausalLM.from_pretrained(folder, digest=digest)


def test_what_is_changed_in_memory_is_loaded(saved: tuple[PeftModel, Path]) -> None:
    """As federated averaging does; a manifest of tensors in memory says nothing of their values."""
    model, folder = saved
    state = get_peft_model_state_dict(model)
    for key, value in state.items():
        if key.endswith("lora_B.weight"):
            state[key] = value / 2
    set_peft_model_state_dict(model, state)
    (name, half), *_ = [(key, value) for key, value in state.items() if key.endswith("lora_B.weight")]
    assert torch.equal(get_peft_model_state_dict(model)[name], half)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[name] = tensors[name] / 2
    with pytest.raises(ValueError, match=f"'{name}' is not the tensor that was saved"):
        set_peft_model_state_dict(model, tensors)


@pytest.mark.parametrize("option", [{"lora_alpha": 99}, {"use_rslora": True}, {"train_beta": False}])
def test_an_option_that_is_changed_too_late_is_not_saved(option: dict[str, Any], tmp_path: Path) -> None:
    model = get_peft_model(llama(), config(task_type="CAUSAL_LM"))
    perturb(model)
    for key, value in option.items():
        setattr(model.peft_config["default"], key, value)
    with pytest.warns(UserWarning, match=r"was set after the model was made with .* It has no effect"):
        model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path)), logits(model))
