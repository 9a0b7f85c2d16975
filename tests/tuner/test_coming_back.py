"""After merging, switching adapters, or another seed for a while, a model is what it was: to the bit, in its residency."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model
from tiny import config, llama, logits, perturb

from hf_lottalora.residency.forms import VirtualWeight

MODES = ["dense", "packed", "streamed"]


def rounded(mode: str) -> PeftModel:
    """A model whose scaffold a cast has rounded, so that its seed does not give it."""
    model = get_peft_model(llama().to(torch.bfloat16), config(residency=mode)).float()
    perturb(model)
    return model


def virtual(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if isinstance(parameter, VirtualWeight)}


@pytest.mark.parametrize("mode", MODES)
def test_a_rounded_scaffold_stays_as_it_is(mode: str) -> None:
    model = rounded(mode)
    expected, held = logits(model), virtual(model)
    with model.disable_adapter():
        logits(model)
    model.set_residency(mode)
    for context in (lambda: model.scaffold_seed(43), lambda: model.scaffold_off()):
        with pytest.raises(ValueError, match="is not what seed 42 draws"), context():
            pass
    if mode != "dense":
        with pytest.raises(ValueError, match="is not what seed 42 draws"):
            model.merge_adapter()
    assert torch.equal(logits(model), expected) and virtual(model) == held and model.residency == mode
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)


def test_a_rounded_scaffold_is_kept_while_adapters_are_merged() -> None:
    model = rounded("dense")
    expected = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)
    model.merge_adapter()
    with model.disable_adapter():  # as in PEFT, layers that run now are unmerged
        logits(model)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("mode", MODES)
def test_switching_a_merged_model_gives_its_memory_back(mode: str) -> None:
    frozen = {"embeddings": "frozen", "norms": "frozen", "residency": mode}
    model = get_peft_model(llama(), config(**frozen))
    model.add_adapter("other", config(**frozen))
    perturb(model)
    expected, held = logits(model), virtual(model)
    model.merge_adapter()
    assert not virtual(model)
    with pytest.warns(UserWarning, match="Unmerging"):
        model.set_adapter("other")
    assert virtual(model) == held
    model.set_adapter("default")
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("mode", MODES)
def test_so_does_the_table_that_another_adapter_has_trained(mode: str) -> None:
    model = get_peft_model(llama(tie_word_embeddings=False), config(residency=mode, embeddings="frozen", head="lora"))
    expected, held = logits(model), virtual(model)
    model.add_adapter("other", config(embeddings="train", head="lora"))
    model.set_adapter("other")
    assert virtual(model) < held or mode == "dense"
    model.set_adapter("default")
    assert virtual(model) == held and torch.equal(logits(model), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
@pytest.mark.parametrize("context", [lambda m: m.scaffold_seed(43), lambda m: m.scaffold_off()])
def test_no_copy_is_made_of_what_is_for_a_while(context: Callable[..., Any], copied: Callable[..., Any]) -> None:
    model = get_peft_model(llama(), config())
    with context(model), pytest.raises(RuntimeError, match="Copy it outside"):
        copied(model)
    copied(model)


def test_saving_what_is_not_in_memory(tmp_path: Any) -> None:
    model = get_peft_model(llama(), config(residency="packed"))
    with pytest.raises(RuntimeError, match=r"use save_pretrained\. For anything else call set_residency\('dense'\)"):
        Accelerator(cpu=True).save_model(model.get_base_model(), tmp_path)
    Accelerator(cpu=True).save_model(model, tmp_path)  # with recipes, see test_state_dicts
    model.set_residency("dense")
    Accelerator(cpu=True).save_model(model.get_base_model(), tmp_path)
