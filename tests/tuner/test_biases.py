"""LoRA's `bias` and `lora_bias`: which biases are trained, and adapters that have one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import bert, config, gpt2, llama, logits, mlp, perturb
from torch import nn

from hf_lottalora import make_plan

REDRAW = ("all", "targets", "none")


def attention() -> nn.Module:
    return nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), nn.Linear(8, 2))


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.Conv1d(6, 4, 1, groups=2))


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "bert": (bert, ["query", "value"]),
    "gpt2": (gpt2, ["c_attn"]),
    "mlp": (mlp, ["0", "2"]),
    "attention": (attention, ["self_attn", "linear1"]),
    "convolutions": (convolutional, ["3"]),
}


def made(name: str, redraw: str = "none", **changes: Any) -> PeftModel:
    build, targets = MODELS[name]
    torch.manual_seed(0)
    settings = {"embeddings": "frozen", "norms": "frozen", "target_modules": targets, "lora_alpha": 6, **changes}
    model = get_peft_model(build(), config(redraw=redraw, **settings)).eval()
    perturb(model)
    return model


def run(name: str, model: nn.Module) -> torch.Tensor:
    if name in ("bert", "gpt2"):
        return logits(model)
    shape = {"mlp": (2, 12), "attention": (2, 3, 8), "convolutions": (2, 4, 7)}[name]
    with torch.no_grad():
        y: torch.Tensor = model(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    return y


def trained_base(model: PeftModel) -> set[str]:
    named = model.base_model.model.named_parameters()
    return {n.replace(".base_layer", "") for n, p in named if p.requires_grad and "lora_" not in n}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set", "ignore:LoRA adapter added to ConvNd")  # PEFT's own
@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize("name", MODELS)
def test_the_biases_that_peft_trains_are_trained(name: str, bias: str) -> None:
    """Besides them, a head is trained here; PEFT is told to train it too."""
    build, targets = MODELS[name]
    model = made(name, bias=bias)
    theirs = get_peft_model(build(), LoraConfig(target_modules=targets, bias=bias))
    expected = trained_base(theirs)
    assert bool(expected) == (bias != "none")
    head = {t.path for t in model.get_plan().tensors if t.survey.in_head and t.role == "trained"}
    assert trained_base(model) == expected | head


@pytest.mark.parametrize("redraw", REDRAW)
@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "mlp", "attention"])
def test_life_with_trained_biases(name: str, bias: str, redraw: str, tmp_path: Path) -> None:
    build, _ = MODELS[name]
    model = made(name, redraw, bias=bias)
    plan, y = model.get_plan(), run(name, model)
    assert model.get_nb_trainable_parameters()[0] == plan.trainable_parameters
    with model.disable_adapter():  # PEFT warns that the biases stay; here they do not
        base = run(name, model)
    assert not torch.equal(base, y)
    if redraw == "none" and name in ("mlp", "bert"):
        torch.manual_seed(0)
        torch.testing.assert_close(base, run(name, build().eval()))
    model.save_pretrained(tmp_path)
    assert abs((tmp_path / "adapter_model.safetensors").stat().st_size - plan.artifact_bytes()) <= 64
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(build(), tmp_path, is_trainable=True)
    assert torch.equal(run(name, again.eval()), y) and trained_base(again) == trained_base(model)
    assert again.peft_config["default"].bias == bias
    model.merge_adapter()
    torch.testing.assert_close(run(name, model), y)
    model.unmerge_adapter()
    assert torch.equal(run(name, model), y)


def test_every_adapter_has_its_own_biases() -> None:
    """PEFT has one copy for all, and refuses a second adapter with biases."""
    model = made("mlp", bias="all")
    first = run("mlp", model)
    model.add_adapter("b", config(redraw="none", target_modules=["0"], bias="all", adapter_seed=3))
    assert torch.equal(run("mlp", model), first) and trained_base(model) == {"0.bias", "2.bias", "4.bias"}
    model.set_adapter("b")
    perturb(model)
    assert not torch.equal(run("mlp", model), first)
    model.set_adapter("default")
    assert torch.equal(run("mlp", model), first)


def test_a_second_adapter_trains_no_bias_of_the_first() -> None:
    model = made("mlp", target_modules=["0"], bias="none")
    model.add_adapter("b", config(redraw="none", target_modules=["2"], bias="lora_only"))
    assert trained_base(model) == set()
    model.set_adapter("b")
    assert trained_base(model) == {"2.bias"}


def test_inference_trains_no_bias(tmp_path: Path) -> None:
    made("bert", bias="all").save_pretrained(tmp_path)
    torch.manual_seed(0)
    assert not any(p.requires_grad for p in PeftModel.from_pretrained(bert(), tmp_path).parameters())


def with_bias(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The effective weight and bias of an adapted layer: `beta W + s B A` and `bias + s b`."""
    base = layer.get_base_layer()
    s, b = layer.scaling["default"], layer.lora_B["default"].bias
    return layer._summed_weight(["default"]), base.bias + s * b


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("name", ["mlp", "convolutions", "attention"])
def test_lora_bias_is_the_literal_equation(name: str, dropout: float) -> None:
    if dropout and name == "attention":
        return
    model = made(name, lora_bias=True, lora_dropout=dropout).double()
    path = {"mlp": "0", "convolutions": "3", "attention": "0.self_attn"}[name]
    layer = model.base_model.model.get_submodule(path)
    parts = [layer.in_proj, layer.out_proj] if name == "attention" else [layer]
    x = torch.randn({"mlp": (2, 12), "convolutions": (2, 6, 5), "attention": (2, 3, 8)}[name], dtype=torch.float64)
    wanted = [x.requires_grad_(), *(p for part in parts for p in part.parameters() if p.requires_grad)]
    assert len(wanted) == 1 + 4 * len(parts)
    if name == "attention":
        (W, bias), (W_out, bias_out) = (with_bias(part) for part in parts)
        tensors = {"in_proj_weight": W, "in_proj_bias": bias, "out_proj.weight": W_out, "out_proj.bias": bias_out}
        expected = torch.func.functional_call(layer.base_layer, tensors, (x, x, x))[0]
        y = layer(x, x, x)[0]
    else:
        W, bias = with_bias(layer)
        expected = torch.func.functional_call(layer.base_layer, {"weight": W, "bias": bias}, (x,))
        y = layer(x)
    torch.testing.assert_close(y, expected)
    g = torch.randn(y.shape, dtype=torch.float64)
    for one, other in zip(*(torch.autograd.grad(z, wanted, g) for z in (y, expected)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("redraw", REDRAW)
@pytest.mark.parametrize("name", ["mlp", "gpt2", "attention"])
def test_life_with_lora_bias(name: str, redraw: str, tmp_path: Path) -> None:
    build, _ = MODELS[name]
    fresh = get_peft_model(build(), config(redraw=redraw, target_modules=MODELS[name][1], lora_bias=True))
    assert all(not p.any() for n, p in fresh.named_parameters() if "lora_B" in n)  # the bias too
    model = made(name, redraw, lora_bias=True)
    plan, y = model.get_plan(), run(name, model)
    biases = {n: p.clone() for n, p in model.named_parameters() if n.endswith("bias") and "lora_" not in n}
    assert model.get_nb_trainable_parameters()[0] == plan.trainable_parameters
    assert any(key.endswith("lora_B.bias") for key in plan.saved_shapes())
    model.merge_adapter()
    torch.testing.assert_close(run(name, model), y)
    merged = {n: p for n, p in model.named_parameters() if n in biases and not torch.equal(p, biases[n])}
    assert merged
    model.save_pretrained(tmp_path)  # what was there before is saved
    model.unmerge_adapter()
    assert torch.equal(run(name, model), y)
    assert all(torch.equal(p, biases[n]) for n, p in model.named_parameters() if n in biases)
    assert abs((tmp_path / "adapter_model.safetensors").stat().st_size - plan.artifact_bytes()) <= 64
    torch.manual_seed(0)
    assert torch.equal(run(name, PeftModel.from_pretrained(build(), tmp_path, is_trainable=True).eval()), y)
    torch.testing.assert_close(run(name, model.merge_and_unload()), y)


def test_lora_bias_is_pefts_where_beta_is_one() -> None:
    model = made("mlp", lora_bias=True, modules_to_save=None)
    torch.manual_seed(0)
    theirs = get_peft_model(mlp(), LoraConfig(r=4, lora_alpha=6, target_modules=["0", "2"], lora_bias=True))
    live = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(live[name])
        for name, parameter in live.items():
            if "beta" in name:
                parameter.fill_(1)
    torch.testing.assert_close(run("mlp", model), run("mlp", theirs))


def test_a_start_that_is_not_zero() -> None:
    model = get_peft_model(mlp(), config(target_modules=["0"], lora_bias=True, init_lora_weights=False))
    bias = model.base_model.model[0].lora_B["default"].bias
    assert bias.any() and float(bias.detach().abs().max()) <= 1 / 4**0.5


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer")  # PEFT's own
def test_without_a_bias_it_cannot_be_merged() -> None:
    model = get_peft_model(llama(), config(lora_bias=True))
    perturb(model)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match="have lora_bias=True, and the layer has no bias to merge it into"):
        model.merge_adapter()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize(
    ("build", "changes", "message"),
    [
        (mlp, {"target_modules": ["0"], "bias": "all"}, "trains a bias of the adapter on '0', and '0.bias', to which"),
        (mlp, {"target_modules": ["0"], "biases": "train"}, "'0.bias', to which that is added, is too"),
        (bert, {"target_modules": ["word_embeddings"]}, "layers with a bias, and .*word_embeddings' is an embedding"),
        (
            lambda: nn.ModuleDict({"m": nn.MultiheadAttention(8, 2, bias=False)}),
            {"target_modules": ["m"]},
            "needs a bias to add to in an nn.MultiheadAttention, and 'm' has none",
        ),
        (
            lambda: nn.ModuleDict({"m": nn.MultiheadAttention(8, 2, kdim=4)}),
            {"target_modules": ["m"]},
            "with kdim or vdim, whose three projections share one bias, and 'm' is one",
        ),
    ],
)
def test_lora_bias_that_makes_no_sense(build: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(build(), config(lora_bias=True, **changes))


def test_two_ways_to_say_it_are_refused() -> None:
    with pytest.raises(ValueError, match="bias='all' and biases='train' both say which biases are trained"):
        config(bias="all", biases="train")
    with pytest.raises(ValueError, match="bias must be one of"):
        config(bias="some")
