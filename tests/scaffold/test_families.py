"""Every family through the whole life of a model: drawn, trained on, saved, loaded, merged and unmerged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from tiny import config, llama, logits, perturb

from hf_lottalora import FAMILIES, AutoLottaLoraModelForCausalLM, register_family


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_life_of_a_model(tmp_path: Path, family: str) -> None:
    model = get_peft_model(llama(), config(family=family, embeddings="lora", init_lora_weights=False)).eval()
    model.verify_scaffold(full=True)
    scales = {spec.scale for spec in model.get_plan().scaffold.values() if "proj" in spec.name}
    assert (scales == {1.0}) == (not FAMILIES[family].exact)
    perturb(model)
    expected = logits(model)
    assert torch.isfinite(expected).all()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path)), expected)
    model.merge_adapter()
    assert torch.allclose(logits(model), expected, atol=1e-4)
    model.unmerge_adapter()
    model.verify_scaffold(full=True)
    assert torch.equal(logits(model), expected)


def test_embeddings_are_normal_where_the_family_needs_a_matrix() -> None:
    plan = get_peft_model(llama(), config(family="orthogonal", embeddings="frozen")).get_plan()
    families = {spec.name: spec.family for spec in plan.scaffold.values()}
    assert families.pop("embed_tokens.weight") == "normal"
    assert set(families.values()) == {"orthogonal"}


@pytest.mark.parametrize("scale", ["fan_in", "xavier"])
def test_a_gain_is_no_standard_deviation(scale: str) -> None:
    with pytest.raises(ValueError, match="scale must be None, or a positive number for family 'orthogonal'"):
        config(family="orthogonal", scale=scale)


def test_an_artifact_of_ones_own_family_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_lottalora.scaffold.families.FAMILIES", before := dict(FAMILIES))
    register_family("mine", table=[-1, -1, -1, 3])
    get_peft_model(llama(), config(family="mine")).save_pretrained(tmp_path)
    del before["mine"]
    with pytest.raises(ValueError, match=r"got 'mine'. If it is somebody's own, run their hf_lottalora.register_fam"):
        AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path)
    register_family("mine", table=[-1, -1, -1, 2])  # the same after normalising
    AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path)
    del before["mine"]
    register_family("mine", table=[-3, 1, 1, 1])
    with pytest.raises(ValueError, match=r"another backbone: 'layers.0.mlp.down_proj.weight' has digest"):
        AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path)
