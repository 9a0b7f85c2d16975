"""Adapters on `nn.MultiheadAttention` against the literal equation, and through the life of a model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import config, perturb
from torch import nn

from hf_lottalora import cost_report, make_plan

BASES: dict[str, dict[str, Any]] = {
    "fused": {"batch_first": True},
    "fused, length first": {},
    "without bias": {"batch_first": True, "bias": False},
    "other keys and values": {"batch_first": True, "kdim": 6, "vdim": 10},
    "bias on keys and values": {"batch_first": True, "add_bias_kv": True, "add_zero_attn": True},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "dora by input": {"use_dora": True, "dora_magnitude": "inputs"},
    "residual": {"residual": True},
}
REDRAW = ("all", "targets", "none")


class Attends(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, **options)
        self.lin = nn.Linear(8, 3)

    def forward(self, query: torch.Tensor, key: Any = None, value: Any = None, **options: Any) -> torch.Tensor:
        key, value = query if key is None else key, query if value is None else value
        return self.lin(self.mha(query, key, value, **options)[0])  # type: ignore[no-any-return]


def settings(**changes: Any) -> Any:
    return config(**{"target_modules": ["mha"], "modules_to_save": ["lin"], "lora_alpha": 6, **changes})


def made(base: str = "fused", dtype: torch.dtype = torch.float64, **changes: Any) -> tuple[PeftModel, Any]:
    torch.manual_seed(0)
    model = get_peft_model(Attends(**BASES[base]), settings(**changes)).to(dtype).eval()
    perturb(model)
    return model, model.base_model.model.mha


def inputs(base: str = "fused", dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    widths = (8, BASES[base].get("kdim", 8), BASES[base].get("vdim", 8))
    return [torch.randn(3, 3, n, generator=generator, dtype=dtype, requires_grad=True) for n in widths]


def literal(layer: Any, base: str, x: list[torch.Tensor], name: str = "default", **options: Any) -> Any:
    """Attention over `V x` where V is `beta W + (alpha / r) B A` of each matrix, with DoRA and residual where on."""
    attention = layer.base_layer
    twin = nn.MultiheadAttention(8, 2, **BASES[base]).to(x[0].dtype).eval()
    twin.load_state_dict(attention.state_dict())
    weights = {}
    for key in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"):
        W = dict(attention.named_parameters()).get(key)
        if W is None:
            continue
        adapter = getattr(layer, key.removesuffix("_weight").removesuffix(".weight"))
        A, B = adapter.lora_A[name].weight, adapter.lora_B[name].weight
        V = adapter.lora_beta[name].value * W + 6 / 4 * B @ A
        if name in adapter.lora_magnitude:
            magnitude = adapter.lora_magnitude[name].value
            norm = V.detach().norm(dim=1 if magnitude.dim() == 1 else 0, keepdim=True)
            V = magnitude.view_as(norm) / norm * V
        if adapter.residual[name] and V.shape[0] == V.shape[1]:
            V = V + torch.eye(len(V))
        weights[key] = V
    return torch.func.functional_call(twin, weights, tuple(x), options)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("base", BASES)
def test_equals_the_literal_equation_with_gradients(base: str, option: str) -> None:
    _, layer = made(base, **OPTIONS[option])
    x = inputs(base)
    wanted = [*x, *(p for p in layer.parameters() if p.requires_grad)]
    matrices = 4 if "kdim" in BASES[base] else 2
    assert len(wanted) == 3 + matrices * (3 + ("use_dora" in OPTIONS[option]))
    (y, weights), (expected, expected_weights) = layer(*x), literal(layer, base, x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-12, atol=1e-12)
    g = torch.randn(y.shape, dtype=torch.float64)
    ours, theirs = torch.autograd.grad(y, wanted, g), torch.autograd.grad(expected, wanted, g)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert all(p.grad_fn is None for p in layer.base_layer.parameters())  # its own matrices are where they were


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_masks_and_both_ways_to_attend(base: str, need_weights: bool, grad: bool) -> None:
    """Without gradients torch computes attention over one input in one kernel."""
    _, layer = made(base)
    x = inputs(base)
    x = x if "kdim" in BASES[base] else [x[0]] * 3
    padding = torch.tensor([[False, False, True], [False, True, True], [False, False, False]])
    causal = torch.ones(3, 3, dtype=torch.bool).triu(1)
    with torch.set_grad_enabled(grad):
        for options in ({}, {"key_padding_mask": padding}, {"attn_mask": causal}, {"average_attn_weights": False}):
            y, weights = layer(*x, need_weights=need_weights, **options)
            expected, expected_weights = literal(layer, base, x, need_weights=need_weights, **options)
            torch.testing.assert_close(y, expected)
            torch.testing.assert_close(weights, expected_weights)
            assert (weights is not None) == need_weights


@torch.no_grad()
@pytest.mark.parametrize("redraw", REDRAW)
@pytest.mark.parametrize("base", BASES)
def test_life_of_a_model(base: str, redraw: str, tmp_path: Path) -> None:
    model, layer = made(base, torch.float32, redraw=redraw)
    x = inputs(base, torch.float32)
    y = model(*x)
    before = {name: p.clone() for name, p in layer.base_layer.named_parameters()}
    plan = model.get_plan()
    named = ((n.replace(".default", "").removesuffix(".norm"), p) for n, p in layer.named_parameters())
    live = {n: tuple(p.shape) for n, p in named if "lora_" in n}
    assert live == {
        f"{a.path}.{n}".removeprefix("mha."): s for a in plan.adapters for n, s in a.shapes.items() if "mha" in a.path
    }
    with model.disable_adapter():
        torch.testing.assert_close(model(*x), model.base_model.model.lin(layer.base_layer(*x)[0]))
    model.merge_adapter()
    torch.testing.assert_close(model(*x), y)
    model.unmerge_adapter()
    assert torch.equal(model(*x), y)
    assert all(torch.equal(p, before[name]) for name, p in layer.base_layer.named_parameters())
    model.save_pretrained(tmp_path)
    assert abs((tmp_path / "adapter_model.safetensors").stat().st_size - plan.artifact_bytes()) < 100
    torch.manual_seed(0)
    # Trainable as the first is: for what does not require gradients, torch may choose another kernel.
    again = PeftModel.from_pretrained(Attends(**BASES[base]), tmp_path, is_trainable=True).eval()
    assert torch.equal(again(*x), y)
    assert again.get_plan().scaffold_digests() == plan.scaffold_digests()
    merged = model.merge_and_unload()
    assert type(merged.mha) is nn.MultiheadAttention and type(merged.mha.out_proj).__name__.startswith("NonDynamically")
    assert set(merged.state_dict()) == set(Attends(**BASES[base]).state_dict())
    torch.testing.assert_close(merged(*x), y)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("base", ["fused", "other keys and values"])
def test_merging_with_every_option(base: str, option: str) -> None:
    model, layer = made(base, **OPTIONS[option])
    x = inputs(base)
    y, before = model(*x), {name: p.clone() for name, p in layer.base_layer.named_parameters()}
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(*x), y)
    model.unmerge_adapter()
    assert torch.equal(model(*x), y)
    assert all(torch.equal(p, before[name]) for name, p in layer.base_layer.named_parameters())


def test_what_is_drawn() -> None:
    drawn = {redraw: set(make_plan(Attends(), settings(redraw=redraw)).scaffold) for redraw in REDRAW}
    matrices = {"mha.in_proj_weight", "mha.out_proj.weight"}
    assert drawn == {"all": matrices, "targets": matrices, "none": set()}
    specs = make_plan(Attends(), settings()).scaffold.values()
    assert {spec.scale for spec in specs} == {1 / math.sqrt(8)}  # fan in, also of the three that are fused


def test_it_starts_as_the_module_without_adapters() -> None:
    torch.manual_seed(0)
    base, x = Attends(), inputs(dtype=torch.float32)[0].transpose(0, 1)
    expected = base.mha(x, x, x)[0]
    model = get_peft_model(base, settings(redraw="none"))
    torch.testing.assert_close(model.base_model.model.mha(x, x, x)[0], expected)


def test_it_is_pefts_where_beta_is_one() -> None:
    """Without an adapter on the output: PEFT adds that one's B A twice."""
    _model, layer = made(redraw="none")
    torch.manual_seed(0)
    options: dict[str, Any] = {"target_modules": ["mha"], "r": 4, "lora_alpha": 6}
    peft = get_peft_model(Attends(**BASES["fused"]), LoraConfig(**options)).double().eval().base_model.model.mha
    with torch.no_grad():
        layer.in_proj.lora_beta["default"].value.fill_(1)
        layer.out_proj.lora_beta["default"].value.fill_(1)
        layer.out_proj.lora_B["default"].weight.zero_()
        peft.lora_A["default"].weight.copy_(layer.in_proj.lora_A["default"].weight)
        peft.lora_B["default"].weight.copy_(layer.in_proj.lora_B["default"].weight)
    x = inputs()
    for ours, theirs in zip(layer(*x), peft(*x), strict=True):
        torch.testing.assert_close(ours, theirs)
    g = torch.randn(3, 3, 8, dtype=torch.float64)
    ours_and_theirs = [
        torch.autograd.grad(m(*x)[0], [p.lora_A["default"].weight, p.lora_B["default"].weight, *x], g)
        for m, p in ((layer, layer.in_proj), (peft, peft))
    ]
    for one, other in zip(*ours_and_theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_several_adapters() -> None:
    model, layer = made(norms="frozen", modules_to_save=None)
    x = inputs()
    alone = literal(layer, "fused", x)[0]
    model.add_adapter("b", settings(r=2, modules_to_save=None, adapter_seed=5))
    torch.testing.assert_close(layer(*x)[0], alone)
    model.set_adapter("b")
    perturb(model)
    expected = {
        name: getattr(layer, name).lora_beta["b"].value * W
        + 6 / 2 * getattr(layer, name).lora_B["b"].weight @ getattr(layer, name).lora_A["b"].weight
        for name, W in (("in_proj", layer.in_proj_weight), ("out_proj", layer.base_layer.out_proj.weight))
    }
    model.base_model.set_adapter(["default", "b"])
    for name, V in expected.items():
        part = getattr(layer, name)
        W = part.get_base_layer().weight
        A, B = part.lora_A["default"].weight, part.lora_B["default"].weight
        summed = V + (part.lora_beta["default"].value - 1) * W + 6 / 4 * B @ A
        torch.testing.assert_close(part.in_place()["weight"], summed.to(W.dtype))
    status = model.get_model_status()
    assert status.active_adapters == ["default", "b"] and status.merged_adapters == []
    model.merge_adapter(["default"])
    assert model.get_model_status().merged_adapters == ["default"]
    model.unmerge_adapter()
    model.delete_adapter("b")
    assert "b" not in layer.in_proj.lora_A
    torch.testing.assert_close(layer(*x)[0], alone)


def encoder(layers: int = 2, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0, **options)
    return nn.ModuleDict({"encoder": nn.TransformerEncoder(layer, layers), "head": nn.Linear(8, 2)})


@pytest.mark.parametrize("targets", [["self_attn"], ["linear1"], ["layers.1.linear2"], ["self_attn", "linear1"]])
def test_torchs_fused_encoders_see_every_adapter(targets: list[str]) -> None:
    """In evaluation without gradients they read weights past the modules that hold them."""
    base = encoder()
    model = get_peft_model(base, config(target_modules=targets, modules_to_save=["head"])).eval()
    perturb(model)
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    for mask in (None, padding):
        expected = base.encoder(x, src_key_padding_mask=mask)
        with torch.no_grad():
            y = base.encoder(x, src_key_padding_mask=mask)
        seen = slice(None) if mask is None else ~mask
        torch.testing.assert_close(y[seen], expected[seen])
    model.unload()
    fresh = encoder()
    for name in ("use_nested_tensor", "layers.0.activation_relu_or_gelu", "layers.1.activation_relu_or_gelu"):
        path, _, attribute = name.rpartition(".")
        now, before = (getattr(m["encoder"].get_submodule(path), attribute) for m in (base, fresh))
        assert now == before, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    x = [tensor.detach().to(dtype) for tensor in inputs(dtype=torch.float32)]
    torch.manual_seed(0)
    model = get_peft_model(Attends(**BASES["fused"]).to(dtype), settings()).eval()
    perturb(model)
    layer = model.base_model.model.mha
    assert layer.in_proj.lora_A["default"].weight.dtype == torch.float32
    assert layer(*x)[0].dtype == dtype
    model.merge_adapter()
    merged = layer(*x)[0]
    model.unmerge_adapter()
    torch.testing.assert_close(layer(*x)[0], merged)
    model, layer = made(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(*inputs(dtype=torch.float32))[0]
    y.float().sum().backward()
    assert layer.in_proj.lora_beta["default"].value.grad.dtype == torch.float32


@pytest.mark.parametrize("residency", ["packed", "streamed"])
def test_residency(residency: str) -> None:
    """The fused matrix stays dense; that of the output is drawn like any other."""
    model, _layer = made(dtype=torch.float32, family="binary")
    x = inputs(dtype=torch.float32)
    y = model(*x)
    model.set_residency(residency)
    assert torch.equal(model(*x), y)
    model.merge_adapter()
    torch.testing.assert_close(model(*x), y)
    model.unmerge_adapter()
    assert torch.equal(model(*x), y)


def test_scaffolds_switch_and_costs_are_counted() -> None:
    model, layer = made()
    x = inputs()
    y = model(*x)
    with model.scaffold_seed(43):
        other = model(*x)
        assert not torch.equal(other, y)
    assert torch.equal(model(*x), y)
    with model.scaffold_off():
        assert not layer.in_proj_weight.any()
    model.verify_scaffold(full=True)
    assert set(model.get_betas()) == {"mha.in_proj", "mha.out_proj"}
    assert cost_report(model).artifact_bytes == model.get_plan().artifact_bytes()


def test_training_changes_adapters_alone() -> None:
    model, _layer = made(modules_to_save=None)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(*inputs()).square().sum().backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_" in name}


def test_patterns_name_the_attention_module() -> None:
    model, layer = made(rank_pattern={"mha": 2}, train_beta_pattern={"mha": False})
    assert layer.in_proj.r == layer.out_proj.r == {"default": 2}
    assert not layer.in_proj.lora_beta["default"].value.requires_grad
    assert model.get_plan().adapter_parameters == sum(p.numel() for p in layer.parameters() if p.requires_grad)


def test_the_output_projection_comes_with_the_rest() -> None:
    plan = make_plan(Attends(), settings(target_modules=["mha", "out_proj"]))
    assert [a.path for a in plan.adapters] == ["mha.in_proj", "mha.out_proj"]
    with pytest.raises(
        ValueError, match=r"'mha.out_proj', a NonDynamicallyQuantizableLinear.*MultiheadAttention: name"
    ):
        make_plan(Attends(), settings(target_modules=["out_proj"]))


@pytest.mark.parametrize("options", [{"layer_norm": True}, {"lora_dropout": 0.1}])
def test_what_it_does_not_take(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} is not supported on nn.MultiheadAttention.*and 'mha' is one"):
        make_plan(Attends(), settings(**options))


def test_no_mixed_batches() -> None:
    model, _ = made(modules_to_save=None)
    x = inputs()
    with pytest.raises(ValueError, match="adapter_names is not supported with adapters on nn.MultiheadAttention"):
        model(*x, adapter_names=["default"] * 3)
