"""Choices per module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from tiny import config, llama, logits, perturb

from hf_lottalora import AutoLottaLoraModelForCausalLM, make_plan


def test_families_and_seeds_by_module(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "family_pattern": {r"mlp\..*": "binary", "o_proj": "orthogonal"},
        "seed_pattern": {r"layers\.1\..*": 5, r"layers\.0\.mlp\.down_proj": -43},
    }
    model = get_peft_model(llama(), config(**options))
    for path, spec in model.get_plan().scaffold.items():
        family = "binary" if ".mlp." in path else "orthogonal" if "o_proj" in path else "normal"
        seed = 47 if "layers.1" in path else 2**64 - 1 if "down_proj" in path else 42
        assert (spec.family, spec.seed) == (family, seed), path
        assert spec.scale == pytest.approx(1.0 if family == "orthogonal" else spec.shape[1] ** -0.5)
    perturb(model)
    model.save_pretrained(tmp_path)
    again = AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    with again.scaffold_seed(7):
        assert {spec.seed for spec in again.get_plan().scaffold.values()} == {7, 12, 2**64 - 36}


def test_an_explicit_scale_holds_for_every_family_but_those_with_a_gain() -> None:
    pattern = {"q_proj": "uniform", "k_proj": "spectral_radius"}
    plan = make_plan(llama(), config(scale=0.5, family_pattern=pattern))
    scales = {spec.name.split(".")[-2]: spec.scale for spec in plan.scaffold.values()}
    assert scales["q_proj"] == scales["v_proj"] == 0.5 and scales["k_proj"] == 1.0


def test_a_gain_is_not_taken_for_a_standard_deviation() -> None:
    plan = make_plan(llama(), config(family="orthogonal", scale=2.0, family_pattern={"q_proj": "normal"}))
    scales = {spec.name.split(".")[-2]: spec.scale for spec in plan.scaffold.values()}
    assert scales["q_proj"] == pytest.approx(32**-0.5) and scales["v_proj"] == 2.0


def test_beta_by_module() -> None:
    model = get_peft_model(llama(), config(train_beta_pattern={"v_proj": False}))
    frozen = {name for name, p in model.named_parameters() if "lora_beta" in name and not p.requires_grad}
    assert frozen == {f"base_model.model.model.layers.{i}.self_attn.v_proj.lora_beta.default.norm" for i in range(2)}
    plan = model.get_plan()
    assert plan.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.set_adapter("default")
    assert not model.base_model.model.model.layers[0].self_attn.v_proj.lora_beta["default"].value.requires_grad
    only = get_peft_model(llama(), config(train_beta=False, train_beta_pattern={"v_proj": True}))
    assert sum("lora_beta" in name and p.requires_grad for name, p in only.named_parameters()) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"family_pattern": {"nope": "binary"}}, "family_pattern has the key 'nope', which matches no drawn module"),
        ({"seed_pattern": {"embed_tokens": 1}}, "seed_pattern has the key 'embed_tokens', which matches no drawn"),
        (
            {"train_beta_pattern": {"up_proj": False}},
            "train_beta_pattern has the key 'up_proj', which matches no adapted",
        ),
        (
            {"family_pattern": {"mlp.*": "binary", "up_proj": "zero"}},
            r"several keys for '\S+up_proj', which disagree: \['mlp",
        ),
        ({"rank_pattern": {"q_proj": 2, ".*proj": 3}}, "rank_pattern has several keys for"),
        ({"family_pattern": {"q_proj": "gauss"}}, "family must be one of"),
        ({"family_pattern": {"q_proj": 1}}, r"family_pattern\['q_proj'\] must be the name of a family, got 1"),
        ({"seed_pattern": {"q_proj": True}}, r"seed_pattern\['q_proj'\] must be an integer, got True"),
        ({"train_beta_pattern": {"q_proj": 0}}, r"train_beta_pattern\['q_proj'\] must be True or False, got 0"),
    ],
)
def test_what_makes_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(llama(), config(**options))
