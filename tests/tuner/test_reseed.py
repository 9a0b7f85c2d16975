"""Another scaffold under the same adapters, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import bert, config, gpt2, llama, logits, mlp, perturb
from torch.nn.utils.parametrizations import weight_norm

from hf_lottalora import AutoLottaLoraModelForCausalLM
from hf_lottalora.paths import owner_of


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("options", [{}, {"embeddings": "lora"}, {"family": "binary", "embeddings": "frozen"}])
@pytest.mark.parametrize("build", [llama, bert, gpt2])
def test_a_seed_for_a_while(build: Any, options: dict[str, Any]) -> None:
    model = get_peft_model(build(), config(**options))
    perturb(model)
    before, expected = state(model), logits(model)
    with model.scaffold_seed(43):
        model.verify_scaffold(full=True)
        changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
        scaffold = {id(getattr(*owner_of(model.base_model.model, path))) for path in model.get_plan().scaffold}
        named = model.named_parameters(remove_duplicate=False)
        assert sorted(changed) == sorted(name for name, p in named if id(p) in scaffold)
        assert not torch.equal(logits(model), expected)
    assert same(state(model), before)
    assert torch.equal(logits(model), expected)
    assert model.peft_config["default"].seed == 42 and model.peft_config["default"].adapter_seed is None
    model.verify_scaffold(full=True)


def test_the_other_scaffold_is_the_one_that_seed_makes() -> None:
    model, fresh = (get_peft_model(llama(), config(seed=seed)) for seed in (42, 43))
    model.set_scaffold_seed(43)
    assert model.get_plan().scaffold == fresh.get_plan().scaffold
    with model.disable_adapter(), fresh.disable_adapter():
        assert torch.equal(logits(model), logits(fresh))
    with model.disable_adapter():  # the base value of what is trained is drawn as well
        model.set_scaffold_seed(44)
    fresh = get_peft_model(llama(), config(seed=44))
    with model.disable_adapter(), fresh.disable_adapter():
        assert torch.equal(logits(model), logits(fresh))


def test_an_error_within_the_context_leaves_it_as_it_was() -> None:
    model = get_peft_model(llama(), config())
    before = state(model)
    with pytest.raises(KeyError), model.scaffold_seed(43):
        raise KeyError
    with pytest.raises(KeyError), model.scaffold_off():
        raise KeyError
    assert same(state(model), before)


def test_an_artifact_has_the_seed_its_scaffold_has(tmp_path: Path) -> None:
    model = get_peft_model(llama(), config())
    perturb(model)
    model.set_scaffold_seed(7)
    model.save_pretrained(tmp_path)
    again = AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path)
    assert again.peft_config["default"].seed == 7 and again.peft_config["default"].adapter_seed == 42
    assert torch.equal(logits(again), logits(model))
    with again.scaffold_seed(8):
        again.save_pretrained(tmp_path / "8")
    assert AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path / "8").peft_config["default"].seed == 8


def test_several_adapters_and_a_deleted_first_one() -> None:
    model = get_peft_model(llama(), config())
    model.add_adapter("other", config(adapter_seed=5))
    before = logits(model)
    with model.scaffold_seed(9):
        model.set_adapter("other")
        model.verify_scaffold(full=True)
        model.set_adapter("default")
    assert torch.equal(logits(model), before)
    model.set_adapter("other")
    model.delete_adapter("default")
    before = logits(model)
    with model.scaffold_seed(9):
        model.verify_scaffold(full=True)
    assert torch.equal(logits(model), before)


def test_no_adapter_is_added_within_a_context_that_would_take_its_scaffold(tmp_path: Path) -> None:
    get_peft_model(llama(), config(seed=9)).save_pretrained(tmp_path)
    model = get_peft_model(llama(), config())
    for context in (model.scaffold_seed(9), model.scaffold_off()):
        with context:
            before = state(model)
            for add in (
                lambda: model.add_adapter("other", config(seed=9)),
                lambda: model.load_adapter(tmp_path, "other"),
            ):
                with pytest.raises(ValueError, match="adapter 'other' cannot be added: at their end .* outside"):
                    add()
            assert same(state(model), before) and set(model.peft_config) == {"default"}
    model.add_adapter("other", config())


def test_scaffold_off_leaves_the_adapters_alone() -> None:
    model = get_peft_model(mlp(), config(target_modules=["0", "2"], modules_to_save=["4"]))
    perturb(model)
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    before = model(x)
    with model.scaffold_off():
        first = model.base_model.model[0]
        A, B = first.lora_A["default"].weight, first.lora_B["default"].weight
        expected = first.scaling["default"] * x @ A.T @ B.T + first.base_layer.bias
        assert torch.allclose(first(x), expected, atol=1e-6)
    assert torch.equal(model(x), before)


def test_scaffold_off_keeps_look_up_tables() -> None:
    model = get_peft_model(llama(), config(embeddings="frozen"))
    with model.scaffold_off():
        assert model.get_input_embeddings().weight.abs().sum() > 0
        assert model.base_model.model.model.layers[0].mlp.up_proj.weight.abs().sum() == 0


def refused(model: PeftModel, message: str) -> None:
    before = state(model)
    with pytest.raises(ValueError, match=message), model.scaffold_seed(43):
        pass
    with pytest.raises(ValueError, match=message), model.scaffold_off():
        pass
    assert same(state(model), before)


def test_what_cannot_be_switched() -> None:
    refused(get_peft_model(llama(), config(redraw="none")), "no scaffold to draw")
    merged = get_peft_model(llama(), config())
    merged.merge_adapter()
    refused(merged, r"Call unmerge_adapter\(\) first")
    with pytest.raises(ValueError, match="seed must satisfy"):
        get_peft_model(llama(), config()).set_scaffold_seed(-1)


@pytest.mark.parametrize("context", [lambda m: m.scaffold_seed(43), lambda m: m.scaffold_off()])
@pytest.mark.parametrize("act", ["merge_adapter", "merge_and_unload", "unload"])
def test_merging_within_is_refused_and_the_end_is_the_beginning(context: Any, act: str) -> None:
    model = get_peft_model(llama(), config())
    perturb(model)
    before = state(model)
    with context(model):
        within = logits(model)
        with pytest.raises(ValueError, match="cannot be merged or unloaded within scaffold_seed or scaffold_off"):
            getattr(model, act)()
        assert torch.equal(logits(model), within)
    assert same(state(model), before)
    model.merge_and_unload()


def test_contexts_nest() -> None:
    model = get_peft_model(llama(), config())
    perturb(model)
    before = logits(model)
    with model.scaffold_off():
        off = logits(model)
        with model.scaffold_off():
            assert torch.equal(logits(model), off)
        assert torch.equal(logits(model), off)
        with model.scaffold_seed(43):
            assert torch.equal(logits(model), off)
        assert torch.equal(logits(model), off)
    assert torch.equal(logits(model), before)
    with model.scaffold_seed(43):
        other = logits(model)
        with model.scaffold_seed(44), model.scaffold_off():
            assert torch.equal(logits(model), off)
        assert torch.equal(logits(model), other)
    assert torch.equal(logits(model), before)


def test_a_config_of_several_models_is_left_alone(tmp_path: Path) -> None:
    shared = config()
    first, second = get_peft_model(llama(), shared), get_peft_model(llama(), shared)
    first.set_scaffold_seed(43)
    assert shared.seed == 42 and shared.adapter_seed is None
    second.save_pretrained(tmp_path / "second")
    first.save_pretrained(tmp_path / "first")
    for name, seed, model in (("first", 43, first), ("second", 42, second)):
        again = AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path / name)
        assert again.get_plan().seed == seed and torch.equal(logits(again), logits(model))
    with second.scaffold_seed(7):
        pass
    assert second.peft_config["default"] is shared


@pytest.mark.parametrize("family", ["normal", "orthogonal"])
def test_a_backward_pass_over_another_scaffold_is_an_error(family: str) -> None:
    model = get_peft_model(llama(), config(family=family))
    x = torch.arange(3, 9)[None]
    with model.scaffold_seed(43):
        loss = model(input_ids=x, labels=x).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_under_weight_norm() -> None:
    def module() -> torch.nn.Module:
        return torch.nn.Sequential(weight_norm(torch.nn.Conv1d(4, 6, 3)), torch.nn.Flatten(), torch.nn.Linear(6, 2))

    options: dict[str, Any] = {"target_modules": ["2"], "biases": "train"}
    model, fresh = (get_peft_model(module(), config(seed=seed, **options)) for seed in (42, 43))
    model.set_scaffold_seed(43)
    assert torch.equal(model.base_model.model[0].weight, fresh.base_model.model[0].weight)
    with pytest.raises(ValueError, match="a direction under weight norm, which cannot be zero"), model.scaffold_off():
        pass
    with pytest.raises(ValueError, match="which family='zero' cannot make"):
        get_peft_model(module(), config(family="zero", init_lora_weights=False, **options))


def test_for_good_is_not_said_within_a_context() -> None:
    model = get_peft_model(llama(), config())
    for context in (model.scaffold_seed(43), model.scaffold_off()):
        with context, pytest.raises(ValueError, match="which restore the scaffold at their end, it cannot be changed"):
            model.set_scaffold_seed(50)
        assert model.get_plan().seed == 42
        model.verify_scaffold()
