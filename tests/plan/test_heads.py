"""Heads that transformers does not tell of: of models that have no base model of their own, and of models within."""

from __future__ import annotations

import pytest
import shrink
import torch
from tiny import config, llama

from hf_lottalora import make_plan
from hf_lottalora.plan.survey import survey_model

HEADS = {
    "clip": ("CLIPForImageClassification", "classifier"),
    "siglip": ("SiglipForImageClassification", "classifier"),
    "pp_lcnet": ("PPLCNetForImageClassification", "head"),
    "parakeet_ctc": ("ParakeetForCTC", "ctc_head"),
    "nemotron_h_omni": ("NemotronH_Omni_Reasoning_V3", "language_model.lm_head"),
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.filterwarnings("ignore")
def test_it_is_trained_by_default_and_adapted_where_asked_for(name: str) -> None:
    class_name, head = HEADS[name]
    cls = next((c for c in shrink.candidates(name) if c.__name__ == class_name), None)
    if cls is None:
        pytest.skip(f"this transformers has no {class_name}")
    with torch.random.fork_rng():
        model = cls(shrink.shrunk_config(name))
    plan = make_plan(model, config(r=2))
    assert {t.path: t.role for t in plan.tensors}[f"{head}.weight"] == "trained"
    assert head not in plan.targets
    if type(model.get_submodule(head)).__module__.startswith("transformers."):  # with a forward of its own
        with pytest.raises(ValueError, match="head='lora': no adapter goes on 'ctc_head', a .*Pass head='train'"):
            make_plan(model, config(r=2, head="lora"))
        return
    adapted = make_plan(model, config(r=2, head="lora"))
    assert {t.path: t.role for t in adapted.tensors}[f"{head}.weight"] == "scaffold"
    assert head in {adapter.path for adapter in adapted.adapters}
    assert head not in make_plan(model, config(r=2, target_modules="all-linear")).targets
    if name != "nemotron_h_omni":  # 0.1's all-linear fails there
        old = make_plan(model, config(r=2, target_modules="all-linear", lottalora_version="0.1.0"))
        assert {t.path: t.role for t in old.tensors}[f"{head}.weight"] == "scaffold"  # it knew of no head


def test_a_head_that_transformers_tells_of_is_none_of_them() -> None:
    assert survey_model(llama()).inner_heads == ()
