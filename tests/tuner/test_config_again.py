"""A config that was read from an artifact, for a model of one's own: what it freezes, and which layers it means."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel, get_peft_model
from tiny import config, llama

from hf_lottalora import AutoLottaLoraModelForCausalLM, LottaLoraConfig, make_plan


def read(folder: Path, **options: Any) -> LottaLoraConfig:
    get_peft_model(llama(), config(**options, task_type="CAUSAL_LM")).save_pretrained(folder)
    return LottaLoraConfig.from_pretrained(folder)


def trains(model: PeftModel) -> bool:
    return any(parameter.requires_grad for parameter in model.parameters())


def test_a_config_that_was_read_freezes_and_says_so(tmp_path: Path) -> None:
    settings = read(tmp_path)
    with pytest.warns(UserWarning, match="Adapter 'default' will not be trained.* set config.inference_mode = False"):
        model = get_peft_model(llama(), settings)
    assert not trains(model)
    with pytest.warns(UserWarning, match="Adapter 'other' will not be trained"):
        model.add_adapter("other", settings)
    settings.inference_mode = False
    assert trains(get_peft_model(llama(), settings))
    assert trains(get_peft_model(llama(), dataclasses.replace(read(tmp_path), inference_mode=False)))


def test_loading_and_a_choice_of_ones_own_are_silent(tmp_path: Path) -> None:
    settings = read(tmp_path)
    for trainable in (True, False):
        for model in (
            PeftModel.from_pretrained(llama(), tmp_path, is_trainable=trainable),
            PeftModel.from_pretrained(llama(), tmp_path, config=settings, is_trainable=trainable),
            AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path, is_trainable=trainable),
        ):
            assert trains(model) == trainable
    model.load_adapter(tmp_path, "other")
    assert not trains(get_peft_model(llama(), config(inference_mode=True)))


PATHS = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]


@pytest.mark.parametrize(
    "change",
    [
        {"target_modules": ["up_proj"]},
        {"target_modules": "all-linear"},
        {"exclude_modules": ["k_proj"]},
        {"layers_to_transform": [0]},
    ],
)
def test_a_changed_choice_beside_the_recorded_one_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    settings = read(tmp_path)
    settings.inference_mode = False
    for name, value in change.items():
        setattr(settings, name, value)
    model = llama()
    with pytest.raises(ValueError, match=r"resolved_targets and the options that choose .* resolved_targets=None"):
        get_peft_model(model, settings)
    assert not any("lora" in name for name, _ in model.named_parameters())
    anew = dataclasses.replace(settings, resolved_targets=None)
    assert get_peft_model(model, anew).get_plan().targets == make_plan(llama(), config(**change)).targets


def test_what_means_the_same_is_no_contradiction(tmp_path: Path) -> None:
    assert make_plan(llama(), config(resolved_targets=PATHS)).targets == tuple(PATHS)
    for same in (["q_proj"], r".*\.q_proj", PATHS):
        assert make_plan(llama(), config(resolved_targets=PATHS, target_modules=same)).targets == tuple(PATHS)
    with pytest.raises(ValueError, match=r"disagree on 4 layers, such as 'model.layers.0.self_attn.k_proj'"):
        make_plan(llama(), config(resolved_targets=PATHS, target_modules=["k_proj"]))
    settings = read(tmp_path, target_modules=["q_proj"], head=None, embeddings="frozen")
    settings.target_modules = r".*\.q_proj"
    assert make_plan(llama(), settings).targets == tuple(PATHS)
    default = read(tmp_path / "default")
    default.inference_mode = False
    for _ in range(2):  # used, it has the layers as target_modules
        get_peft_model(llama(), default)
