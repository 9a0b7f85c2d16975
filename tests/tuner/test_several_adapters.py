"""Adapters of different options over one base model, and what must not be combined."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import SIZES, bert, config, llama, logits, mlp, perturb
from torch import nn
from transformers import BertConfig, BertForQuestionAnswering, BertForTokenClassification

from hf_lottalora import (
    AutoLottaLoraModelForCausalLM,
    AutoLottaLoraModelForQuestionAnswering,
    AutoLottaLoraModelForTokenClassification,
    make_plan,
)


def trained(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    ("head", "task_type", "loader"),
    [
        (BertForTokenClassification, "TOKEN_CLS", AutoLottaLoraModelForTokenClassification),
        (BertForQuestionAnswering, "QUESTION_ANS", AutoLottaLoraModelForQuestionAnswering),
    ],
)
def test_task_types_whose_head_peft_would_wrap(tmp_path: Path, head: Any, task_type: str, loader: Any) -> None:
    model = get_peft_model(head(BertConfig(**SIZES)), config(task_type=task_type))
    perturb(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(loader.from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize("options", [{}, {"redraw": "none", "save_kept": True}])
def test_what_one_adapter_trains_and_another_keeps(tmp_path: Path, options: dict[str, Any]) -> None:
    model = get_peft_model(llama(), config(**options))
    perturb(model)
    first = logits(model)
    model.add_adapter("b", config(**options, norms="frozen", embeddings="frozen"))
    model.set_adapter("b")
    perturb(model)
    second = logits(model)
    for installed in ("default", "b"):
        model.set_adapter(installed)
        model.save_pretrained(tmp_path / installed)
        alone = AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path / installed / "b")
        assert torch.equal(logits(alone), second), installed
    if not options:
        other = get_peft_model(llama(), config())
        perturb(other)
        before = logits(other)
        other.load_adapter(tmp_path / "b" / "b", "b")
        assert torch.equal(logits(other), before)
        other.set_adapter("b")
        assert torch.equal(logits(other), second)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)


def test_another_adapter_is_over_the_same_base_to_the_bit(tmp_path: Path) -> None:
    """Also where digests have no sample."""
    options = {"redraw": "none", "save_kept": True}
    base = BertForQuestionAnswering(BertConfig(**{**SIZES, "hidden_size": 96, "intermediate_size": 96})).eval()
    other = copy.deepcopy(base)
    model = get_peft_model(base, config(**options)).eval()
    perturb(model)
    get_peft_model(copy.deepcopy(other), config(**options)).save_pretrained(tmp_path / "same")
    with torch.no_grad():
        other.bert.encoder.layer[0].intermediate.dense.weight.view(-1)[100] += 5
    get_peft_model(other, config(**options)).save_pretrained(tmp_path / "other")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_adapter(tmp_path / "same", "same")
    with pytest.raises(ValueError, match=r"another '.*intermediate\.dense\.weight' than the base model that the other"):
        model.load_adapter(tmp_path / "other", "other")
    assert list(model.peft_config) == list(model.base_model.plans) == ["default", "same"]
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())


FROZEN = {"norms": "frozen", "embeddings": "frozen"}


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (FROZEN, {}),
        ({**FROZEN, "biases": "frozen"}, {**FROZEN, "biases": "train"}),
        ({**FROZEN, "redraw": "targets", "save_kept": True}, {"redraw": "targets", "save_kept": True}),
        ({}, {**FROZEN, "biases": "train"}),
    ],
)
def test_another_adapter_changes_nothing_of_the_one_in_use(
    tmp_path: Path, first: dict[str, Any], second: dict[str, Any], loaded: bool
) -> None:
    """Whatever the other trains, and starts from: the one in use reads the same tensors as before."""
    torch.manual_seed(0)
    base = bert().eval()
    other = get_peft_model(copy.deepcopy(base), config(**second)).eval()
    perturb(other)
    other.save_pretrained(tmp_path)
    model = get_peft_model(base, config(**first)).eval()
    perturb(model)
    before, state = logits(model), {key: value.clone() for key, value in model.state_dict().items()}
    if loaded:
        model.load_adapter(tmp_path, "b")
    else:
        model.add_adapter("b", config(**second))
    assert torch.equal(logits(model), before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items() if key in state)
    if loaded:
        model.set_adapter("b")
        assert torch.equal(logits(model), logits(other))
        model.set_adapter("default")
    torch.testing.assert_close(logits(model.merge_and_unload()), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "first", "second"),
    [
        ({"tie_word_embeddings": False}, {"head": "lora"}, {}),
        ({}, {}, {"modules_to_save": ["mlp"]}),
        ({}, {"family": "binary"}, {"family": "binary", "embeddings": "frozen"}),
    ],
)
def test_adapters_that_need_another_base_are_refused(
    model: dict[str, Any], first: dict[str, Any], second: dict[str, Any]
) -> None:
    built = get_peft_model(llama(**model), config(**first))
    with pytest.raises(ValueError, match=r"Adapter 'b' needs '.*' as drawn .*, but this model's first adapter made it"):
        built.add_adapter("b", config(**second))


def test_the_scaffold_outlives_the_adapter_that_made_it() -> None:
    model = get_peft_model(llama(), config())
    model.delete_adapter("default")
    with pytest.raises(ValueError, match=r"'b' has seed=7, but this model's scaffold was made with seed=42"):
        model.add_adapter("b", config(seed=7))


def test_a_config_object_can_be_used_again() -> None:
    settings = config(modules_to_save=["mlp"])
    counts = {trained(get_peft_model(llama(), used)) for used in (settings, settings, copy.deepcopy(settings))}
    assert len(counts) == 1
    assert make_plan(llama(), settings).trainable_parameters in counts
    fresh = config()
    make_plan(llama(), fresh)
    assert fresh.target_modules is None  # planning changes nothing
    get_peft_model(bert(), fresh)


def test_one_config_object_for_two_living_models(tmp_path: Path) -> None:
    settings = config()
    first, _second = get_peft_model(llama(), settings), get_peft_model(llama(hidden_size=64), settings)
    first.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path)), logits(first))


def test_saving_while_merged_saves_what_was_there_before(tmp_path: Path) -> None:
    model = get_peft_model(llama(), config(redraw="none", save_kept=True))
    perturb(model)
    expected = logits(model)
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path)), expected)


def test_running_statistics_cannot_be_shared() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))

    def settings() -> Any:
        return config(target_modules=["0"], modules_to_save=["2"])

    model = get_peft_model(build(), settings())
    with pytest.raises(ValueError, match=r"cannot be added: the model has running statistics \(BatchNorm\)"):
        model.add_adapter("b", settings())


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's own
def test_a_base_that_carries_adapters_is_refused() -> None:
    base = llama()
    get_peft_model(base, config())
    with pytest.raises(ValueError, match="already carries adapters"):
        get_peft_model(base, config(seed=3))


@pytest.mark.parametrize("name", ["norm", "weight"])
def test_an_adapter_name_that_occurs_in_the_model_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"An adapter cannot be called '{name}'"):
        get_peft_model(llama(), config(), adapter_name=name)
    model = get_peft_model(mlp(), config(target_modules=["0"], modules_to_save=["4"]))
    with pytest.raises(ValueError, match=f"An adapter cannot be called '{name}'"):
        model.add_adapter(name, config(target_modules=["0"], modules_to_save=["4"]))


def test_a_lora_head_with_pefts_task_type() -> None:
    plan = get_peft_model(bert(), config(task_type="SEQ_CLS", head="lora")).get_plan()
    assert "classifier" in {adapter.path for adapter in plan.adapters}


def test_saving_a_scaffold_that_was_changed_is_refused(tmp_path: Path) -> None:
    model = get_peft_model(llama(), config()).to(torch.bfloat16).to(torch.float32)
    with pytest.raises(ValueError, match=r"is not what seed 42 draws .* cast to a smaller dtype and back"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_a_base_value_that_is_not_there_is_refused_before_anything_changes(tmp_path: Path) -> None:
    get_peft_model(llama(), config(redraw="none", save_kept=True)).save_pretrained(tmp_path)
    model = AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path)
    expected = logits(model)
    with pytest.raises(ValueError, match="The pretrained value of 'model.embed_tokens.weight' is needed"):
        model.delete_adapter("default")
    assert set(model.peft_config) == {"default"} and torch.equal(logits(model), expected)


def test_switching_while_disabled_stays_at_the_base() -> None:
    model = get_peft_model(llama(), config())
    model.add_adapter("b", config(adapter_seed=3))
    perturb(model)
    with model.disable_adapter():
        base = logits(model)
        model.set_adapter("b")
        assert torch.equal(logits(model), base)


def test_shared_weights_are_refused() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    module[1].weight = module[0].weight
    with pytest.raises(ValueError, match=r"'0' shares its weight \(0.weight, 1.weight\)"):
        get_peft_model(module, config(target_modules=["0"], modules_to_save=["2"]))


def test_the_loaders_take_no_unknown_options(tmp_path: Path) -> None:
    get_peft_model(llama(), config()).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"does not take \['lora_alpha'\]"):
        AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path, lora_alpha=16)
    assert isinstance(AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16), PeftModel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"embeddings": "lora", "r": 1}, {"use_dora": True}, {"layer_norm": True}])
def test_the_same_config_object_makes_a_copy(options: dict[str, Any], dtype: torch.dtype) -> None:
    """TRL makes the reference of DPO so; an equal config is a new start."""
    model = get_peft_model(llama().to(dtype), config(**options))
    start = logits(model)
    perturb(model)
    expected, names = logits(model), [name for name, p in model.named_parameters() if p.requires_grad]
    model.add_adapter("twin", model.peft_config["default"])
    model.add_adapter("new", config(**options))
    assert [name for name, p in model.named_parameters() if p.requires_grad] == names
    for adapter, output in {"twin": expected, "new": start, "default": expected}.items():
        model.set_adapter(adapter)
        assert torch.equal(logits(model), output), adapter
    model.set_adapter("twin")
    perturb(model)  # it shares no memory
    model.set_adapter("default")
    assert torch.equal(logits(model), expected)


def test_a_config_object_that_was_changed_makes_no_copy() -> None:
    model = get_peft_model(llama(), config())
    perturb(model)
    settings = model.peft_config["default"]
    settings.r = 2
    model.add_adapter("new", settings)
    model.set_adapter("new")
    assert {layer.r["new"] for layer in model.modules() if hasattr(layer, "lora_beta")} == {2}
    assert set(model.get_betas().values()) == {1.0}


def test_switching_freezes_whatever_is_not_active() -> None:
    """Also what somebody made trainable by hand; the flags are set without PEFT's walk."""
    model = get_peft_model(llama(), config(embeddings="lora", train_beta=False))
    model.add_adapter("b", config(embeddings="lora", adapter_seed=3))
    own = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
    for parameter in own.values():
        parameter.requires_grad_(True)
    model.set_adapter("b")
    assert {name for name in own if own[name].requires_grad} == {name for name in own if ".b" in name}
    model.set_adapter("default")
    fixed = {name for name in own if ".default" in name and "lora_beta" in name}
    assert {name for name in own if own[name].requires_grad} == {n for n in own if ".default" in n} - fixed and fixed
    model.set_adapter("b", inference_mode=True)
    assert trained(model) == 0


def test_the_scaffold_is_digested_once_for_all_adapters_of_its_roles() -> None:
    model = get_peft_model(llama(), config())
    model.add_adapter("b", config(r=2))
    model.add_adapter("c", config(norms="frozen", embeddings="frozen"))  # its scaffold has the embedding, too
    digests = {name: model.get_plan(name).scaffold_digests() for name in ("default", "b", "c")}
    assert digests["b"] is digests["default"] and digests["c"].items() > digests["b"].items()
