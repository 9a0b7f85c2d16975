"""`delete_adapter` leaves nothing behind: the whole state is compared, whatever it is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import config, llama
from torch import nn

from hf_lottalora.layers.layer import ScaffoldLayer


def state_of(thing: Any, seen: tuple[int, ...] = ()) -> Any:
    """Everything that an object holds, down to plain values; a tensor is its values and whether it is trained."""
    if id(thing) in seen:
        return "above"
    seen = (*seen, id(thing))
    if isinstance(thing, torch.Tensor):
        return (thing.detach().double().tolist(), thing.requires_grad)
    if isinstance(thing, nn.Module):
        return state_of(vars(thing), seen)
    if isinstance(thing, Mapping):
        return {str(key): state_of(value, seen) for key, value in thing.items()}
    if isinstance(thing, (list, tuple)):
        return [state_of(value, seen) for value in thing]
    return sorted(map(str, thing)) if isinstance(thing, (set, frozenset)) else repr(thing)


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(4, 2, 1))


def attention() -> nn.Module:
    return nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8))


OPTIONS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "plain": (llama, {}),
    "dropout, own alpha, frozen beta": (
        llama,
        {"lora_dropout": 0.1, "lora_alpha": 3, "use_rslora": True, "train_beta": False},
    ),
    "dora, residual, norm": (llama, {"use_dora": True, "residual": True, "layer_norm": True}),
    "embeddings": (llama, {"embeddings": "lora"}),
    "attention": (attention, {"target_modules": ["self_attn"], "use_dora": True}),
    "convolutions": (convolutions, {"target_modules": ["0"], "modules_to_save": ["2"], "residual": True}),
}


def layers(model: PeftModel) -> dict[str, Any]:
    return {path: state_of(m) for path, m in model.named_modules() if isinstance(m, ScaffoldLayer)}


@pytest.mark.filterwarnings("ignore:Adapter b was active which is now deleted")
@pytest.mark.parametrize("active", [False, True])
@pytest.mark.parametrize("redraw", ["all", "none"])
@pytest.mark.parametrize("case", OPTIONS)
def test_nothing_of_a_deleted_adapter_is_left(case: str, redraw: str, active: bool) -> None:
    build, options = OPTIONS[case]
    model = get_peft_model(build(), config(redraw=redraw, **options))
    before = layers(model)
    assert before
    tuner = {name: state_of(vars(model.base_model)[name]) for name in ("plans", "peft_config", "_modules")}
    model.add_adapter("b", config(redraw=redraw, adapter_seed=3, **options))
    if active:
        model.set_adapter("b")
    assert layers(model) != before
    model.delete_adapter("b")
    assert layers(model) == before
    assert tuner == {name: state_of(vars(model.base_model)[name]) for name in tuner}


@pytest.mark.parametrize("case", OPTIONS)
def test_nothing_of_the_only_adapter_is_left(case: str) -> None:
    """No container keeps its name, whatever the container is."""
    build, options = OPTIONS[case]
    model = get_peft_model(build(), config(**options), adapter_name="the only one")
    assert "the only one" in str(layers(model))
    model.delete_adapter("the only one")
    assert layers(model) and "the only one" not in str(layers(model))
    assert not model.base_model.plans and not model.base_model.trained.planned
