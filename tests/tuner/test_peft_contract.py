"""PEFT's public surface for an adapter, over a drawn backbone and over one that is kept: the behaviour users rely on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter
from tiny import bert, config, gpt2, ids, llama, logits, perturb
from torch import nn

from hf_lottalora import LottaLoraConfig

REGIMES = ("all", "targets", "none")
BUILDS = (llama, bert, gpt2)
pytestmark = [pytest.mark.parametrize("redraw", REGIMES)]


def made(build: Any, redraw: str, **options: Any) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(build(), config(redraw=redraw, **options)).eval()
    perturb(model)
    return model


def base(build: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = build()
    return model


@pytest.mark.parametrize("build", BUILDS)
def test_attributes(build: Any, redraw: str) -> None:
    model = made(build, redraw)
    assert isinstance(model, PeftModel)
    assert model.active_adapter == "default" and model.active_adapters == ["default"]
    assert model.peft_type == "LOTTALORA" and list(model.peft_config) == ["default"]
    assert isinstance(model.peft_config["default"], LottaLoraConfig)
    trainable, everything = model.get_nb_trainable_parameters()
    assert trainable == model.get_plan().trainable_parameters and everything > trainable
    status, layers = model.get_model_status(), model.get_layer_status()
    assert status.peft_types == {"default": "LOTTALORA"} and status.enabled is True
    assert status.merged_adapters == [] and status.requires_grad == {"default": True}
    assert len(layers) == len(model.get_plan().adapters)
    text = repr(model.base_model.model)
    assert {layer.module_type for layer in layers} <= {"lottalora.Linear", "lottalora.Conv1D"}
    assert "lottalora." in text and "lora_A" not in text  # one line for each


def test_the_config_round_trips_through_a_file(redraw: str, tmp_path: Path) -> None:
    made(llama, redraw).save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, LottaLoraConfig)
    for name in ("r", "lora_alpha", "redraw", "seed", "family", "scale", "embeddings", "norms"):
        assert getattr(loaded, name) == getattr(config(redraw=redraw), name), name
    assert loaded.inference_mode is True


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("build", BUILDS)
def test_save_and_load(build: Any, redraw: str, tmp_path: Path, low_cpu_mem_usage: bool) -> None:
    model = made(build, redraw)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(build), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(again), logits(model))
    assert not any(p.requires_grad for p in again.parameters())
    trainable = PeftModel.from_pretrained(base(build), tmp_path, is_trainable=True)
    assert trainable.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()


def test_state_dicts(redraw: str) -> None:
    model, other = made(llama, redraw), get_peft_model(base(llama), config(redraw=redraw)).eval()
    state = get_peft_model_state_dict(model)
    assert not any("default" in key for key in state)
    assert not torch.equal(logits(model), logits(other))
    result = set_peft_model_state_dict(other, state)
    assert result.unexpected_keys == []
    assert torch.equal(logits(model), logits(other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging(redraw: str, dtype: torch.dtype, safe_merge: bool) -> None:
    torch.manual_seed(0)
    model = get_peft_model(llama().to(dtype), config(redraw=redraw)).eval()
    perturb(model)
    before = logits(model)
    tolerance = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    model.merge_adapter(safe_merge=safe_merge)
    assert model.get_model_status().merged_adapters == ["default"]
    torch.testing.assert_close(logits(model), before, atol=tolerance, rtol=tolerance)
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert not any("lora_" in name for name in merged.state_dict())
    torch.testing.assert_close(logits(merged), before, atol=tolerance, rtol=tolerance)


def test_merging_a_second_time_warns_and_changes_nothing(redraw: str) -> None:
    model = made(llama, redraw)
    model.merge_adapter()
    before = logits(model)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    assert torch.equal(logits(model), before)
    with model.disable_adapter(), pytest.warns(UserWarning, match="Already unmerged"):
        logits(model)
        model.unmerge_adapter()


def test_unload_gives_back_the_base(redraw: str) -> None:
    model = made(llama, redraw)
    with model.disable_adapter():
        expected = logits(model)
    assert torch.equal(logits(model.unload()), expected)
    if redraw == "none":
        assert torch.equal(expected, logits(base(llama).eval()))


def test_disabling_and_enabling(redraw: str) -> None:
    model = made(llama, redraw)
    before = logits(model)
    with model.disable_adapter():
        assert not torch.equal(logits(model), before)
        assert model.get_model_status().enabled is False
    assert torch.equal(logits(model), before)
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)


def test_adding_switching_and_deleting(redraw: str) -> None:
    model = made(llama, redraw, embeddings="frozen", norms="frozen")
    first = logits(model)
    model.add_adapter("other", config(redraw=redraw, r=2, embeddings="frozen", norms="frozen", adapter_seed=9))
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    perturb(model)
    second = logits(model)
    assert not torch.equal(first, second)
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    assert not torch.equal(both, first) and not torch.equal(both, second)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad and "beta" in n} == {"default"}
    model.delete_adapter("other")
    assert list(model.peft_config) == ["default"] and not any(".other" in name for name in model.state_dict())
    assert torch.equal(logits(model), first)
    with pytest.raises(ValueError, match="Adapter nothing does not exist"):
        model.delete_adapter("nothing")
    with pytest.raises(ValueError, match="nothing not found"):
        model.set_adapter("nothing")


def test_set_requires_grad(redraw: str) -> None:
    model = made(llama, redraw)
    model.set_requires_grad("default", requires_grad=False)
    assert not any(p.requires_grad for p in model.parameters())
    model.set_requires_grad("default")
    assert model.get_nb_trainable_parameters()[0] == model.get_plan().trainable_parameters


@pytest.mark.parametrize("low_rank", [{"r": 2}, {"rank_pattern": {"q_proj": 3, "layers.0.self_attn.v_proj": 5}}])
def test_ranks(redraw: str, low_rank: dict[str, Any]) -> None:
    model = made(llama, redraw, **low_rank)
    ranks = {name: layer.r["default"] for name, layer in model.named_modules() if hasattr(layer, "lora_beta")}
    for name, rank in ranks.items():
        pattern = low_rank.get("rank_pattern", {})
        assert rank == next((r for key, r in pattern.items() if name.endswith(key)), low_rank.get("r", 4))


def test_mixed_batches(redraw: str) -> None:
    model = made(llama, redraw, embeddings="frozen", norms="frozen")
    model.add_adapter("other", config(redraw=redraw, embeddings="frozen", norms="frozen", adapter_seed=9))
    model.set_adapter("other")
    perturb(model)
    x = ids(3)
    expected = []
    with torch.no_grad():
        for row, name in enumerate(("default", "other", None)):
            if name is None:
                with model.disable_adapter():
                    expected.append(model(x)["logits"][row])
            else:
                model.set_adapter(name)
                expected.append(model(x)["logits"][row])
        mixed = model(x, adapter_names=["default", "other", "__base__"])["logits"]
    torch.testing.assert_close(mixed, torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_training_with_gradient_checkpointing(redraw: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = made(llama, redraw).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model(input_ids=ids(), labels=ids()).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_modules_to_save(redraw: str, tmp_path: Path) -> None:
    model = made(bert, redraw, modules_to_save=["pooler"])
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "pooler" in n}
    assert trained == {f"base_model.model.bert.pooler.dense.{kind}" for kind in ("weight", "bias")}
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base(bert), tmp_path)), logits(model))


def test_what_is_not_supported_says_so(redraw: str, tmp_path: Path) -> None:
    model = made(llama, redraw)
    model.save_pretrained(tmp_path)
    before = logits(model)
    with pytest.raises(ValueError, match="add_weighted_adapter is not supported: a LottaLoRA adapter also scales"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    with pytest.raises(ValueError, match="does not support PeftType.LOTTALORA because it uses shared state"):
        inject_adapter_in_model(config(redraw=redraw), llama())
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but LOTTALORA was passed"):
        hotswap_adapter(model, str(tmp_path), "default")
    assert torch.equal(logits(model), before)
