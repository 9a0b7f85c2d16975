"""Adapters on convolutions against the literal equation, with the kernel as a matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import config
from torch import nn

from hf_lottalora import make_plan
from hf_lottalora.layers.conv import ScaffoldConv

CASES = {
    "1d": (nn.Conv1d, {"kernel_size": 3}),
    "1d stride": (nn.Conv1d, {"kernel_size": 4, "stride": 2, "padding": 1, "bias": False}),
    "2d": (nn.Conv2d, {"kernel_size": 3, "padding": 1}),
    "2d groups": (nn.Conv2d, {"kernel_size": 3, "groups": 4, "stride": (2, 1)}),
    "2d depthwise": (nn.Conv2d, {"kernel_size": 3, "groups": 8, "padding": 1}),
    "2d dilation": (nn.Conv2d, {"kernel_size": (3, 2), "dilation": 2, "padding": (1, 0)}),
    "2d same": (nn.Conv2d, {"kernel_size": 3, "padding": "same"}),
    "2d reflect": (nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}),
    "3d": (nn.Conv3d, {"kernel_size": 2, "padding": 1}),
}


def network(case: str) -> nn.Sequential:
    conv, options = CASES[case]
    return nn.Sequential(conv(8, 16, **options), nn.ReLU())


@pytest.fixture(params=["one kernel", "apart"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to compute, whichever would be cheaper."""
    monkeypatch.setattr(ScaffoldConv, "_one_kernel_is_cheaper", lambda *_: request.param == "one kernel")
    return request.param


def adapted(case: str, dtype: torch.dtype = torch.float64, **changes: Any) -> tuple[PeftModel, ScaffoldConv]:
    model = get_peft_model(network(case), config(r=8, target_modules=["0"], lora_alpha=6, **changes)).to(dtype)
    layer = model.base_model.model[0]
    generator = torch.Generator().manual_seed(1)
    for name, parameter in layer.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model, layer


def image(case: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    dims = CASES[case][0](1, 1, 1).weight.dim() - 2
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, 8, *([7] * dims), generator=generator, dtype=dtype, requires_grad=True)


def literal(layer: ScaffoldConv, x: torch.Tensor, name: str = "default") -> torch.Tensor:
    """conv(x, beta W + (alpha / r) B A) + bias with B A the product of the matrices, group by group."""
    base = layer.base_layer
    A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
    groups = base.groups
    products = [b.flatten(1) @ a.flatten(1) for a, b in zip(A.chunk(groups), B.chunk(groups), strict=True)]
    kernel = layer.lora_beta[name].value * base.weight + 6 / 8 * torch.cat(products).view(base.weight.shape)
    if base.padding_mode != "zeros":
        x = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)
    padding = base.padding if base.padding_mode == "zeros" else 0
    function = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.dim()]
    return function(x, kernel, base.bias, base.stride, padding, base.dilation, groups)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_literal_equation_with_gradients(case: str) -> None:
    _, layer = adapted(case)
    x = image(case)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    assert len(wanted) == 4
    y, expected = layer(x), literal(layer, x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    g = torch.randn(y.shape, dtype=torch.float64)
    ours, theirs = torch.autograd.grad(y, wanted, g), torch.autograd.grad(expected, wanted, g)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer(x[0]), y[0])  # without a batch dimension


@pytest.mark.parametrize("case", CASES)
def test_life_of_a_model(case: str, tmp_path: Path) -> None:
    model, layer = adapted(case, torch.float32)
    x = image(case, torch.float32).detach()
    y = model(x)
    weight = layer.base_layer.weight.clone()
    shapes = {k.split("lora_")[1]: tuple(v.shape) for k, v in layer.named_parameters() if "lora_" in k}
    planned = model.get_plan().adapters[0].shapes
    assert sorted(shapes.values()) == sorted(planned.values())
    model.merge_adapter()
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, weight) and torch.equal(model(x), y)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(network(case), tmp_path)(x), y)
    torch.testing.assert_close(model.merge_and_unload()(x), y, rtol=1e-4, atol=1e-4)


def test_double_backward() -> None:
    _, layer = adapted("2d groups")
    x = image("2d groups")
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    (literal_gradient,) = torch.autograd.grad(literal(layer, x).square().sum(), x, create_graph=True)
    beta = layer.lora_beta["default"].value
    second = [torch.autograd.grad(g.square().sum(), beta)[0] for g in (gradient, literal_gradient)]
    torch.testing.assert_close(*second)


@pytest.mark.parametrize("case", ["2d groups", "2d depthwise"])
def test_dora_with_groups_computes_with_the_kernel_that_test_options_checks(case: str) -> None:
    _, layer = adapted(case, use_dora=True)
    x, base = image(case), layer.base_layer
    torch.testing.assert_close(layer(x), base._conv_forward(x, layer._summed_weight(["default"]), base.bias))


def test_several_adapters_dropout_and_disabling() -> None:
    model, layer = adapted("2d", lora_dropout=0.5)
    x = image("2d")
    model.eval()
    torch.testing.assert_close(layer(x), literal(layer, x))
    assert not torch.equal(layer(x), model.train()(x))
    model.eval()
    model.add_adapter("other", config(r=4, target_modules=["0"]))
    model.base_model.set_adapter(["default", "other"])
    with torch.no_grad():
        layer.lora_beta["other"].value.fill_(1.5)
    base = F.conv2d(x, layer.base_layer.weight, None, padding=1)
    torch.testing.assert_close(layer(x), literal(layer, x) + 0.5 * base)
    with model.disable_adapter():
        torch.testing.assert_close(layer(x), layer.base_layer(x))


def test_autocast_keeps_to_bfloat16() -> None:
    _, layer = adapted("2d", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(image("2d", torch.float32))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.lora_beta["default"].value.grad.dtype == torch.float32


def bytes_kept(layer: nn.Module, x: torch.Tensor) -> int:
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(kept.values())


def test_beta_keeps_no_bytes_for_backward(way: str) -> None:
    x = image("2d", torch.float32).detach().requires_grad_()
    _, ours = adapted("2d", torch.float32)
    theirs = get_peft_model(network("2d"), LoraConfig(r=8, target_modules=["0"])).base_model.model[0]
    kernel = ours.base_layer.weight.nbytes if way == "one kernel" else 0
    assert bytes_kept(ours, x) <= bytes_kept(theirs, x) + kernel + 4  # beta itself


@pytest.mark.parametrize(("channels", "one_kernel"), [(16, True), (48, True), (512, False)])
def test_one_kernel_where_it_is_cheaper(channels: int, one_kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model = get_peft_model(nn.Sequential(nn.Conv2d(channels, channels, 3)), config(r=8, target_modules=["0"]))
    assert model.base_model.model[0]._one_kernel_is_cheaper(["default"]) == one_kernel


def test_what_cannot_be_adapted() -> None:
    with pytest.raises(ValueError, match=r"with groups=4: its rank must be a multiple of that, got r=6"):
        make_plan(network("2d groups"), config(r=6, target_modules=["0"]))
    with pytest.raises(ValueError, match=r"matches '0', a ConvTranspose2d. Adapters go on nn.Linear, Conv1D, "):
        make_plan(nn.Sequential(nn.ConvTranspose2d(8, 8, 3)), config(target_modules=["0"]))
    assert not any(a.kind == "conv" for a in make_plan(_mixed(), config(target_modules="all-linear")).adapters)


def test_magnitudes_by_input_take_no_dropout() -> None:
    with pytest.raises(ValueError, match="lora_dropout and dora_magnitude='inputs' do not go together on convolutions"):
        make_plan(network("2d"), config(target_modules=["0"], use_dora=True, dora_magnitude="inputs", lora_dropout=0.1))


def _mixed() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 8))
