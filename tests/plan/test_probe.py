"""Subclasses of linear layers and convolutions: adapters go around their forward, or they are refused with the reason."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import config, ids, llama, perturb
from torch import nn
from transformers import FalconConfig, FalconForCausalLM, Llama4TextConfig
from transformers.integrations.bitnet import AutoBitLinear
from transformers.models.bit.modeling_bit import WeightStandardizedConv2d
from transformers.models.efficientnet.modeling_efficientnet import EfficientNetDepthwiseConv2d
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.idefics.modeling_idefics import IdeficsDecoupledLinear
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.models.perceiver.modeling_perceiver import Conv2dSamePadding
from transformers.pytorch_utils import Conv1D

from hf_lottalora import AutoLottaLoraModelForCausalLM, make_plan
from hf_lottalora.plan.probe import has_own_forward, why_not_around


class Causal(nn.Conv1d):
    """As in Gemma 4, Voxtral, Nemotron and others: padded on the left, or by what a cache holds of earlier calls."""

    def __init__(self, inputs: int, outputs: int, kernel: int, cache_key: str) -> None:
        super().__init__(inputs, outputs, kernel)
        self.cache_key = cache_key

    def forward(self, x: torch.Tensor, cache: torch.Tensor | None = None) -> torch.Tensor:
        past = x.new_zeros(*x.shape[:-1], self.kernel_size[0] - 1) if cache is None else cache
        return super().forward(torch.cat([past, x], dim=-1))


class Convolving(nn.Conv2d):
    def _conv_forward(self, x: torch.Tensor, weight: torch.Tensor, bias: Any) -> torch.Tensor:
        return super()._conv_forward(F.pad(x, (2, 0, 2, 0)), weight, bias)


class Rows(Conv1D):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("...i,io->...o", x, self.weight) + self.bias


def with_method(layer: nn.Module, forward: Any) -> nn.Module:
    layer.forward = types.MethodType(forward, layer)
    return layer


ACCEPTED = {
    "FalconLinear": lambda: FalconLinear(12, 8),
    "no bias": lambda: FalconLinear(12, 12, bias=False),
    "Conv1D": lambda: Rows(8, 12),
    "by instance": lambda: with_method(nn.Linear(12, 8), lambda layer, x: x @ layer.weight.T + layer.bias),
    "nothing added": lambda: IdeficsDecoupledLinear(12, 8),
    "same padding": lambda: Conv2dSamePadding(12, 8, (3, 2)),
    "causal": lambda: Causal(12, 8, 3, "key"),
    "_conv_forward": lambda: Convolving(12, 8, 3, groups=4),
}


class Clamped(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).clamp(-65504, 65504)


class Noisy(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(F.dropout(x, 0.5, self.training))


class Fake8Bit(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        step = self.weight.abs().amax().clamp_min(1e-9) / 127
        return F.linear(x, (self.weight / step).round() * step, self.bias)


class Normed(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(F.normalize(x, dim=-1))


class Transposed(nn.Conv1d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


def closed_over() -> nn.Module:
    layer = nn.Conv1d(12, 8, 1).double()
    layer.forward = lambda x: F.conv1d(x, layer.weight)  # type: ignore[method-assign]
    return layer


ROUTER = {"hidden_size": 12, "num_local_experts": 4, "num_experts_per_tok": 2}
REFUSED = {
    r"a WeightStandardizedConv2d, whose forward does not scale with its weight\. Adapters go on": lambda: (
        WeightStandardizedConv2d(12, 8, 3)
    ),
    "a Clamped, whose forward does not scale with its weight": lambda: Clamped(12, 8),
    "a Fake8Bit, whose forward is not linear in its weight": lambda: Fake8Bit(12, 8),
    r"a AutoBitLinear, whose forward computes something else than x W\^T \+ bias": lambda: AutoBitLinear(12, 8),
    r"a Normed, whose forward computes something else than x W\^T": lambda: Normed(12, 8),
    r"a IdeficsDecoupledLinear, whose forward computes something else than x W\^T": lambda: IdeficsDecoupledLinear(
        12, 8, out_additional_features=2
    ),
    "a Noisy, whose forward gives another output each time in training mode": lambda: Noisy(12, 8),
    "a Llama4Router, whose forward returns a tuple instead of a tensor": lambda: Llama4Router(
        Llama4TextConfig(**ROUTER)
    ),
    r"a Transposed, whose forward cannot be tried on a small copy \(RuntimeError: Given groups=1": lambda: Transposed(
        12, 8, 1
    ),
    "a Conv1d, whose forward does not read its weight": closed_over,
}


@pytest.mark.parametrize("text", REFUSED)
def test_refused_with_the_reason(text: str) -> None:
    network = nn.Sequential(REFUSED[text](), nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"target_modules matches '0', " + text):
        make_plan(network, config(target_modules=["0"], redraw="none"))
    adapters = make_plan(network, config(target_modules="all-linear", redraw="none")).adapters
    assert {"0", "1"} & {adapter.path for adapter in adapters} == {"1"}


def test_a_quantised_weight() -> None:
    eight_bits = FalconLinear(12, 8).to(torch.float8_e4m3fn)
    assert why_not_around(eight_bits) == "multiplies with a weight of torch.float8_e4m3fn"


@pytest.mark.parametrize("name", ACCEPTED)
def test_the_probe_leaves_the_module_alone(name: str) -> None:
    layer = ACCEPTED[name]()
    calls: list[object] = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    attributes, random = dict(vars(layer)), torch.get_rng_state()
    assert has_own_forward(layer) and why_not_around(layer) is None
    assert torch.equal(torch.get_rng_state(), random) and not calls and vars(layer) == attributes
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    assert why_not_around(layer.to("meta")) is None  # needs no values


def test_the_probe_needs_no_memory_of_a_large_layer() -> None:
    assert why_not_around(FalconLinear(1 << 20, 1 << 20, device="meta")) is None  # 4 TiB
    assert why_not_around(Causal(12, 8, 3, "key").to("meta")) is None
    with torch.device("meta"):
        assert why_not_around(Conv2dSamePadding(1 << 16, 1 << 16, 3)) is None


def hooked(layer: nn.Module) -> nn.Module:
    """As Accelerate's device maps leave it: with an instance-level forward around the class's."""
    return add_hook_to_module(layer, AlignDevicesHook("cpu", weights_map={"weight": torch.ones(1)}))


def test_torchs_own_forward_needs_no_probe() -> None:
    layers = (
        nn.Linear(2, 2),
        Conv1D(2, 2),
        nn.Conv3d(2, 2, 1),
        EfficientNetDepthwiseConv2d(2),
        hooked(nn.Linear(2, 2)),
    )
    assert not any(has_own_forward(layer) for layer in layers)


def test_hooks_of_accelerate_are_no_forward() -> None:
    assert has_own_forward(hooked(FalconLinear(12, 8))) and why_not_around(hooked(FalconLinear(12, 8))) is None
    assert why_not_around(hooked(Clamped(12, 8))) == "does not scale with its weight"


def adapted(name: str, **changes: Any) -> tuple[PeftModel, Any, torch.Tensor]:
    network = nn.Sequential(ACCEPTED[name]()).double()
    settings = config(target_modules=["0"], lora_alpha=6, **changes)
    model = get_peft_model(network, settings, autocast_adapter_dtype=False)
    layer = model.base_model.model[0]
    generator = torch.Generator().manual_seed(1)
    for parameter_name, parameter in layer.named_parameters():
        if "lora_" in parameter_name:
            parameter.data.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    dims = layer.base_layer.weight.dim() - 2
    x = torch.randn(2, 12, *[7] * dims) if dims else torch.randn(2, 3, 12)
    return model, layer, x.double().requires_grad_()


def literal(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """The module's own forward with `beta W + (alpha / r) B A`, and DoRA's magnitude, as its weight."""
    base = layer.base_layer
    A, B = (tensor.flatten(1) for tensor in layer._pair("default"))
    groups = getattr(base, "groups", 1)
    products = torch.cat([b @ a for a, b in zip(A.chunk(groups), B.chunk(groups), strict=True)])
    products = products.t() if isinstance(base, Conv1D) else products.view(base.weight.shape)
    weight = layer.lora_beta["default"].value * base.weight + layer.scaling["default"] * products
    if "default" in layer.lora_magnitude:
        rows = weight.t() if isinstance(base, Conv1D) else weight
        magnitude = layer.lora_magnitude["default"].value
        parts = rows.unflatten(0, (groups, -1))
        if magnitude.dim() == 1:
            norms = parts.detach().flatten(2).norm(dim=2)
            factor = (magnitude.view_as(norms) / norms).view(*norms.shape, *(1 for _ in rows.shape[1:]))
        else:
            factor = (magnitude / parts.detach().norm(dim=1))[:, None]
        rows = (parts * factor).flatten(0, 1)
        weight = rows.t() if isinstance(base, Conv1D) else rows
    y: torch.Tensor = torch.func.functional_call(base, {"weight": weight}, (x,))
    return y


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "DoRA": {"use_dora": True},
    "DoRA by input": {"use_dora": True, "dora_magnitude": "inputs"},
    "streamed": {"residency": "streamed"},
}


@pytest.mark.parametrize("name", ACCEPTED)
@pytest.mark.parametrize("options", OPTIONS)
def test_equals_the_literal_equation_with_gradients(name: str, options: str) -> None:
    model, layer, x = adapted(name, **OPTIONS[options])
    assert layer.own_forward
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    y, expected = model(x), literal(layer, x)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    g = torch.randn(y.shape, dtype=torch.float64)
    ours, theirs = torch.autograd.grad(y, wanted, g), torch.autograd.grad(expected, wanted, g)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    weight = layer.original_weight().clone()
    model.merge_adapter()
    torch.testing.assert_close(model(x), y, rtol=1e-9, atol=1e-9)
    model.unmerge_adapter()
    assert torch.equal(layer.original_weight(), weight) and torch.equal(model(x), y)


def test_further_arguments_reach_the_forward() -> None:
    _, layer, x = adapted("causal")
    cache = torch.ones(2, 12, 2, dtype=torch.float64)
    both = torch.cat([cache, x], dim=-1)
    torch.testing.assert_close(layer(x, cache), layer(both)[..., 2:])
    torch.testing.assert_close(layer(x, cache=cache), layer(both)[..., 2:])


def test_options_on_a_convolution_with_a_forward_of_its_own() -> None:
    for options, text in (({"residual": True}, "residual"), ({"lora_dropout": 0.1}, "lora_dropout")):
        with pytest.raises(
            ValueError, match=rf"{text} is not supported on convolutions with a forward of their own, and '0', a Causal"
        ):
            adapted("causal", **options)


def kept(layer: nn.Module, x: torch.Tensor) -> int:
    found = {}
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_going_around_keeps_no_more_than_peft_does(dtype: torch.dtype) -> None:
    x = torch.randn(128, 64, dtype=dtype, requires_grad=True)
    models = [
        get_peft_model(nn.Sequential(FalconLinear(64, 256)).to(dtype), settings)
        for settings in (config(target_modules=["0"]), LoraConfig(r=4, target_modules=["0"]))
    ]
    ours, theirs = (kept(model.base_model.model[0], x) for model in models)
    assert ours <= theirs


@pytest.mark.parametrize("name", ["FalconLinear", "same padding"])
def test_compiled_without_a_graph_break(name: str) -> None:
    model, _, x = adapted(name)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


def falcon() -> FalconForCausalLM:
    return FalconForCausalLM(FalconConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4))


@pytest.mark.parametrize("options", [{}, {"target_modules": "all-linear", "use_dora": True}, {"embeddings": "lora"}])
def test_life_of_falcon(options: dict[str, Any], tmp_path: Path) -> None:
    model = get_peft_model(falcon(), config(**options))
    perturb(model)
    adapters = len(
        [a for a in model.get_plan().adapters if "word_embeddings" not in a.path and "lm_head" not in a.path]
    )
    assert f"{adapters} of them keep their own, and one output each: FalconLinear" in str(model.get_plan())
    model(input_ids=ids(), labels=ids()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        logits = model.eval()(ids()).logits
        model.save_pretrained(tmp_path)
        assert torch.equal(AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path)(ids()).logits, logits)
        assert torch.equal(PeftModel.from_pretrained(falcon(), tmp_path).eval()(ids()).logits, logits)
        plain = model.merge_and_unload()
        torch.testing.assert_close(plain(ids()).logits, logits, rtol=1e-4, atol=1e-4)
    assert plain.state_dict().keys() == falcon().state_dict().keys()


def test_a_convolution_class_with_another_constructor() -> None:
    network = nn.Sequential(EfficientNetDepthwiseConv2d(8, depth_multiplier=2))
    model = get_peft_model(network, config(r=8, target_modules=["0"]))
    perturb(model)
    x = torch.randn(2, 8, 5, 5)
    y = model(x)
    assert "keep their own" not in str(model.get_plan())
    model.merge_adapter()
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)


def test_a_tied_head_that_computes_something_else() -> None:
    model = llama()
    model.lm_head.__class__ = Normed
    with pytest.raises(ValueError, match=r"would adapt the tied head 'lm_head' too, but it is a Normed, whose forward"):
        make_plan(model, config(embeddings="lora"))


def test_a_table_of_which_another_parameter_holds_a_row() -> None:
    class WithRow(nn.Embedding):  # as in T5Gemma 2
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            rows = super().forward(ids) * self.embed_scale
            rows[ids == 3] = self.row
            return rows

    model = llama()
    table: Any = model.model.embed_tokens
    table.__class__, table.embed_scale = WithRow, 2.0
    assert any(a.kind == "embedding" for a in make_plan(model, config(embeddings="lora")).adapters)
    table.row = nn.Parameter(torch.zeros(32))
    with pytest.raises(ValueError, match="embeddings='lora' needs a token embedding that looks up ids"):
        make_plan(model, config(embeddings="lora"))
