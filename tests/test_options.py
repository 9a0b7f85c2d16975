"""DoRA, LayerNorm, residual and head modes against the literal equations, and through the life of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import bert, config, llama, logits, mlp, perturb
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_lottalora import AutoLottaLoraModelForCausalLM, AutoLottaLoraModelForSequenceClassification

RANK = 12  # a multiple of every number of groups below
BASES = {
    "linear": lambda: nn.Linear(12, 5),
    "square": lambda: nn.Linear(12, 12),
    "square without bias": lambda: nn.Linear(12, 12, bias=False),
    "Conv1D": lambda: Conv1D(12, 12),
    "conv": lambda: nn.Conv2d(12, 12, 3, padding=1),
    "conv that shrinks": lambda: nn.Conv2d(12, 6, 3, stride=2),
    "groups": lambda: nn.Conv1d(12, 12, 3, padding="same", groups=4),
    "depthwise": lambda: nn.Conv2d(12, 24, (3, 2), stride=2, groups=12),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "dora by input": {"use_dora": True, "dora_magnitude": "inputs"},
    "residual": {"residual": True},
    "layer_norm": {"layer_norm": True},
    "all": {"use_dora": True, "residual": True, "layer_norm": True},
}
CASES = [
    (base, option)
    for base in BASES
    for option in OPTIONS
    if not ("layer_norm" in OPTIONS[option] and base in ("conv", "conv that shrinks", "depthwise", "groups"))
]


def build(base: str, option: str, dtype: torch.dtype = torch.float64) -> tuple[PeftModel, Any, torch.Tensor]:
    model = get_peft_model(
        nn.Sequential(BASES[base]()), config(r=RANK, target_modules=["0"], lora_alpha=6, **OPTIONS[option])
    ).to(dtype)
    perturb(model)
    dims = {"conv": 2, "conv that shrinks": 2, "groups": 1, "depthwise": 2}.get(base, 0)
    shape = (2, 12, *([7] * dims)) if dims else (2, 3, 12)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=dtype)
    return model, model.base_model.model[0], x.requires_grad_()


def literal(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """m V / |V| x + bias with V = beta W + (alpha / r) B A, then + x, then LayerNorm, each where it is asked for."""
    base, name = layer.base_layer, "default"
    A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
    groups = getattr(base, "groups", 1)
    parts = [b.flatten(1) @ a.flatten(1) for a, b in zip(A.chunk(groups), B.chunk(groups), strict=True)]
    W = base.weight.t() if isinstance(base, Conv1D) else base.weight
    V = layer.lora_beta[name].value * W + 6 / RANK * torch.cat(parts).view(W.shape)
    if name in layer.lora_magnitude:
        # The norm counts as a constant (DoRA, section 4.3).
        magnitude = layer.lora_magnitude[name].value  # of shape (outputs,) or (groups, inputs of a group, ...)
        matrices = V.unflatten(0, (groups, -1))
        dims = list(range(2, matrices.dim())) if magnitude.dim() == 1 else [1]
        norm = matrices.detach().square().sum(dims, keepdim=True).sqrt()
        V = (magnitude.view_as(norm) / norm * matrices).flatten(0, 1)
    if V.dim() == 2:
        y = F.linear(x, V, base.bias)
    else:
        conv = {3: F.conv1d, 4: F.conv2d}[V.dim()]
        y = conv(x, V, base.bias, base.stride, base.padding, base.dilation, base.groups)
    if layer.residual[name] and y.shape == x.shape:
        y = y + x
    if name in layer.lora_norm_weight:
        y = F.layer_norm(y, y.shape[-1:], layer.lora_norm_weight[name].value, layer.lora_norm_bias[name].value)
    return y


@pytest.mark.parametrize(("base", "option"), CASES)
def test_equals_the_literal_equation_with_gradients(base: str, option: str) -> None:
    _, layer, x = build(base, option)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    assert len(wanted) == 4 + ("use_dora" in OPTIONS[option]) + 2 * ("layer_norm" in OPTIONS[option])
    y, expected = layer(x), literal(layer, x)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    g = torch.randn(y.shape, dtype=torch.float64)
    ours, theirs = torch.autograd.grad(y, wanted, g), torch.autograd.grad(expected, wanted, g)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("base", "option"), CASES)
def test_life_of_a_model(base: str, option: str, tmp_path: Path) -> None:
    model, layer, x = build(base, option, torch.float32)
    y = model(x)
    weight = layer.base_layer.weight.clone()
    live = {k.split("lora_")[1]: tuple(v.shape) for k, v in layer.named_parameters() if "lora_" in k}
    assert sorted(live.values()) == sorted(model.get_plan().adapters[0].shapes.values())
    if "layer_norm" in OPTIONS[option]:
        with pytest.raises(ValueError, match="have a LayerNorm after the layer, which no weight can contain"):
            model.merge_adapter()
        assert torch.equal(layer.base_layer.weight, weight)
    else:
        model.merge_adapter()
        torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, weight) and torch.equal(model(x), y)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(nn.Sequential(BASES[base]()), tmp_path)
    assert torch.equal(again(x), y)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(
    ("options", "keeps"),
    [
        ({"kernel_size": 1, "padding": "valid"}, True),
        ({"kernel_size": 2, "padding": "same"}, True),
        ({"kernel_size": 2, "padding": 1, "dilation": 2}, True),
        ({"kernel_size": 3, "padding": 1, "stride": 2}, False),
        ({"kernel_size": 3}, False),
    ],
)
def test_the_residual_is_there_wherever_the_shape_stays(options: dict[str, Any], keeps: bool) -> None:
    model = get_peft_model(nn.Sequential(nn.Conv1d(4, 4, **options)), config(target_modules=["0"], residual=True))
    layer, x = model.base_model.model[0], torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0))
    plain = layer.base_layer(x)
    assert (plain.shape == x.shape) == keeps
    torch.testing.assert_close(layer(x), plain + x if keeps else plain)
    if keeps and options["kernel_size"] == 2:
        with pytest.raises(ValueError, match="with an even kernel cannot be merged"):
            model.merge_adapter()


@pytest.mark.parametrize("per", ["outputs", "inputs"])
def test_dora_starts_as_the_layer_without_it(per: str) -> None:
    plain = get_peft_model(llama(), config())
    dora = get_peft_model(llama(), config(use_dora=True, dora_magnitude=per))
    torch.testing.assert_close(logits(dora), logits(plain))
    magnitude = dora.base_model.model.model.layers[0].self_attn.q_proj.lora_magnitude["default"].value
    weight = dora.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    torch.testing.assert_close(
        magnitude.detach(), weight.norm(dim=0, keepdim=True) if per == "inputs" else weight.norm(dim=1)
    )


@pytest.mark.parametrize("option", OPTIONS)
def test_in_a_transformer(option: str, tmp_path: Path) -> None:
    model = get_peft_model(llama(), config(**OPTIONS[option]))
    perturb(model)
    model(input_ids=torch.arange(3, 9)[None], labels=torch.arange(3, 9)[None]).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_dora_norms_are_exact_under_autocast() -> None:
    _, layer, x = build("square", "dora", torch.float32)
    expected = layer._norms("default")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer._norms("default"), expected)
        assert layer(x).dtype == torch.bfloat16


def test_two_at_once_are_refused() -> None:
    model = get_peft_model(mlp(), config(target_modules=["0"], embeddings="frozen", use_dora=True))
    model.add_adapter("other", config(target_modules=["0"], embeddings="frozen"))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="cannot be active together: use_dora, layer_norm and residual do not add up"):
        model(torch.randn(2, 12))
    with pytest.raises(ValueError, match="cannot be active together"):
        model.merge_adapter(["default", "other"])


def test_going_on_without_the_residual_is_refused(tmp_path: Path) -> None:
    get_peft_model(llama(), config(residual=True)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trained with residual=True, this model has False"):
        get_peft_model(llama(), config()).load_adapter(tmp_path, "default")


def test_convolutions_that_cannot() -> None:
    with pytest.raises(ValueError, match="layer_norm is not supported on convolutions, and '0' is one"):
        get_peft_model(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), config(target_modules=["0"], layer_norm=True))


@pytest.mark.parametrize("base", ["linear", "Conv1D", "conv", "conv that shrinks"])
def test_dora_is_pefts_where_beta_is_one(base: str) -> None:
    """PEFT's own on grouped convolutions takes norms of another product, so the literal equation stands for those."""
    model, layer, x = build(base, "dora")
    torch.manual_seed(0)
    theirs = get_peft_model(
        nn.Sequential(BASES[base]()),
        LoraConfig(r=RANK, target_modules=["0"], lora_alpha=6, use_dora=True, fan_in_fan_out=base == "Conv1D"),
    ).to(torch.float64)
    peft = theirs.base_model.model[0]
    with torch.no_grad():
        layer.lora_beta["default"].value.fill_(1)
        peft.base_layer.weight.copy_(layer.base_layer.weight)
        peft.base_layer.bias.copy_(layer.base_layer.bias)
        peft.lora_A["default"].weight.copy_(layer.lora_A["default"].weight)
        peft.lora_B["default"].weight.copy_(layer.lora_B["default"].weight)
        magnitude = peft.lora_magnitude_vector["default"].weight
        magnitude.copy_(layer.lora_magnitude["default"].value.view_as(magnitude))
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-10, atol=1e-10)


def test_head_modes(tmp_path: Path) -> None:
    trained = {}
    for head in ("train", "lora", "lora_bias"):
        model = get_peft_model(bert(), config(head=head))
        trained[head] = {
            n.split("classifier.")[1] for n, p in model.named_parameters() if "classifier" in n and p.requires_grad
        }
        perturb(model)
        model.save_pretrained(tmp_path / head)
        again = AutoLottaLoraModelForSequenceClassification.from_pretrained(tmp_path / head)
        assert torch.equal(logits(again), logits(model))
    adapter = {"lora_A.default.weight", "lora_B.default.weight", "lora_beta.default.norm"}
    assert trained == {"train": {"weight", "bias"}, "lora": adapter, "lora_bias": {*adapter, "base_layer.bias"}}


def test_the_bias_of_an_adapted_layer_of_a_plain_module_can_be_trained() -> None:
    model = get_peft_model(mlp(), config(target_modules=["0", "2", "4"], modules_to_save=["4.bias"]))
    assert [n for n, p in model.named_parameters() if p.requires_grad and "lora" not in n] == [
        "base_model.model.4.base_layer.bias"
    ]
