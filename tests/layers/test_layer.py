from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from tiny import config, gpt2, ids, llama, mlp, perturb
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_lottalora import beta_report
from hf_lottalora.layers.functional import ScaledLinear
from hf_lottalora.layers.linear import ScaffoldLinear


def layer_of(
    base: nn.Module, dtype: torch.dtype = torch.float64, adapters: int = 1, **changes: Any
) -> tuple[ScaffoldLinear, torch.Tensor]:
    """A layer with values that no initialisation has, and an input of shape (2, 3, 12)."""
    torch.manual_seed(0)
    settings = config(target_modules=["0"], lora_alpha=6, **changes)
    layer = ScaffoldLinear(base.to(dtype), "a0", config=settings, r=4, lora_alpha=6)
    for i in range(1, adapters):
        layer.update_layer(f"a{i}", 4, 6, settings)
    layer.set_adapter([f"a{i}" for i in range(adapters)])
    layer.to(dtype)
    for parameter in layer.parameters():
        parameter.data.normal_()
    return layer, torch.randn(2, 3, 12, dtype=dtype, requires_grad=True)


def literal(layer: ScaffoldLinear, x: torch.Tensor, adapters: int = 1) -> torch.Tensor:
    """beta (W x) + (alpha / r) B A x + bias, as the paper writes it; further adapters add to the same W x."""
    base = layer.base_layer
    W = base.weight.t() if isinstance(base, Conv1D) else base.weight
    Wx = x @ W.t()
    y = Wx if base.bias is None else Wx + base.bias
    for i in range(adapters):
        name = f"a{i}"
        A, B, beta = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.lora_beta[name].value
        y = y + (beta - 1) * Wx + (6 / 4) * (x @ A.t() @ B.t())
    return y


BASES = {
    "linear": lambda: nn.Linear(12, 5),
    "linear without bias": lambda: nn.Linear(12, 5, bias=False),
    "conv1d": lambda: Conv1D(5, 12),
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("adapters", [1, 3])
def test_equals_the_literal_equation_with_gradients(base: str, adapters: int) -> None:
    layer, x = layer_of(BASES[base](), adapters=adapters)
    wanted = [x, *(p for name, p in layer.named_parameters() if p.requires_grad)]
    assert any(p is layer.lora_beta["a0"].value for p in wanted)
    grad = torch.randn(2, 3, 5, dtype=torch.float64)
    results = []
    for y in (layer(x), literal(layer, x, adapters)):
        results.append((y.detach(), torch.autograd.grad(y, wanted, grad)))
    (y, ours), (expected, theirs) = results
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("base", BASES)
def test_first_and_second_derivatives(base: str) -> None:
    layer, x = layer_of(BASES[base]())
    weight = layer.base_layer.weight.detach().requires_grad_()
    bias = layer.base_layer.bias
    bias = None if bias is None else bias.detach().requires_grad_()
    A, B, beta = layer.lora_A["a0"].weight, layer.lora_B["a0"].weight, layer.lora_beta["a0"].value

    def function(*tensors: torch.Tensor | None) -> torch.Tensor:
        return ScaledLinear.apply(*tensors, 0.7, isinstance(layer.base_layer, Conv1D))

    assert torch.autograd.gradcheck(function, (x, weight, bias, beta, A, B))
    assert torch.autograd.gradgradcheck(function, (x, weight, bias, beta, A, B))


@pytest.mark.parametrize("shape", [(12,), (1, 12), (0, 12), (2, 3, 4, 12)])
def test_input_shapes(shape: tuple[int, ...]) -> None:
    layer, _ = layer_of(nn.Linear(12, 5))
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, literal(layer, x))
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == shape


def test_input_that_is_not_contiguous() -> None:
    layer, x = layer_of(nn.Linear(12, 5))
    strided = x.detach().transpose(0, 1)
    torch.testing.assert_close(layer(strided), literal(layer, strided))


def test_rank_stabilised_scaling() -> None:
    layer, _ = layer_of(nn.Linear(12, 5), use_rslora=True)
    assert layer.scaling["a0"] == 6 / 4**0.5


def test_a_beta_that_is_not_trained_stays_one() -> None:
    model = get_peft_model(mlp(), config(target_modules=["0"], train_beta=False))
    model(torch.ones(1, 12)).sum().backward()
    betas = [p for name, p in model.named_parameters() if "lora_beta" in name]
    assert [(float(p), p.requires_grad, p.grad) for p in betas] == [(1.0, False, None)]
    model.set_adapter("default")
    assert not betas[0].requires_grad


def test_beta_has_one_dimension_and_starts_at_one() -> None:
    model = get_peft_model(llama(), config())
    betas = [p for name, p in model.named_parameters() if "lora_beta" in name]
    assert len(betas) == 8 and all(p.shape == (1,) and p.item() == 1 for p in betas)
    assert set(model.get_betas().values()) == {1.0} and len(model.get_betas()) == 8
    for look in (model.get_betas, model.get_plan, lambda name: beta_report(model, name)):
        with pytest.raises(ValueError, match=r"There is no adapter 'typo'. There are \['default'\]"):
            look("typo")


def test_starting_output_is_the_scaffolds() -> None:
    model = get_peft_model(mlp(), config(target_modules=["0", "2"]))
    x = torch.ones(3, 12)
    with model.disable_adapter():
        base = model(x)
    torch.testing.assert_close(model(x), base, rtol=0, atol=0)


def test_dropout_acts_on_the_adapter_alone() -> None:
    layer, x = layer_of(nn.Linear(12, 5), lora_dropout=0.5)
    layer.train()
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    dropped = layer.lora_dropout["a0"](x)
    A, B = layer.lora_A["a0"].weight, layer.lora_B["a0"].weight
    base = layer.lora_beta["a0"].value * (x @ layer.base_layer.weight.t()) + layer.base_layer.bias
    torch.testing.assert_close(y, base + (6 / 4) * (dropped @ A.t() @ B.t()))
    torch.testing.assert_close(layer.eval()(x), literal(layer, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype(dtype: torch.dtype) -> None:
    model = get_peft_model(mlp().to(dtype), config(target_modules=["0", "2"]))
    assert model.base_model.model[0].lora_A["default"].weight.dtype is torch.float32  # PEFT's autocast_adapter_dtype
    y = model(torch.ones(3, 12, dtype=dtype))
    assert y.dtype is dtype
    y.float().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.dtype is parameter.dtype, name


def test_autocast_matches_the_equation_in_bfloat16() -> None:
    layer, x = layer_of(nn.Linear(12, 5), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.float(), literal(layer, x), rtol=0.05, atol=0.15)
    y.float().sum().backward()
    reference = torch.autograd.grad(literal(layer, x).sum(), layer.lora_beta["a0"].value)[0]
    torch.testing.assert_close(layer.lora_beta["a0"].value.grad, reference, rtol=0.05, atol=0.5)


def bytes_for_backward(model: nn.Module, batch: torch.Tensor) -> int:
    """Bytes autograd saves in one forward pass, each storage once, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(input_ids=batch, labels=batch)
    output.loss.backward()
    return sum(saved.values())


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "k_proj", "v_proj", "o_proj"]])
def test_beta_costs_no_bytes_for_backward(targets: Any) -> None:
    options = {"r": 4, "target_modules": targets}
    ours = get_peft_model(llama(), config(embeddings="frozen", norms="frozen", **options))
    peft = get_peft_model(llama(), LoraConfig(**options))
    for model in (ours, peft):
        model.enable_input_require_grads()
    assert bytes_for_backward(ours, ids()) <= bytes_for_backward(peft, ids())


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("embeddings", ["train", "lora"])
def test_merge_then_unmerge_is_the_identity(build: Any, embeddings: str) -> None:
    model = get_peft_model(build(), config(embeddings=embeddings, target_modules="all-linear"))
    perturb(model)
    model.eval()
    with torch.no_grad():
        logits = model(ids()).logits
        before = {name: value.clone() for name, value in model.state_dict().items()}
        model.merge_adapter(safe_merge=True)
        torch.testing.assert_close(model(ids()).logits, logits, rtol=2e-4, atol=2e-4)
        with pytest.raises(ValueError, match="is not what seed 42 draws"):
            model.verify_scaffold()
        model.unmerge_adapter()
        assert torch.equal(model(ids()).logits, logits)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    model.verify_scaffold(full=True)


@pytest.mark.parametrize("redraw", ["all", "none"])
def test_merge_and_unload_returns_the_plain_model(redraw: str) -> None:
    model = get_peft_model(llama(), config(redraw=redraw))
    perturb(model)
    model.eval()
    with torch.no_grad():
        logits = model(ids()).logits
        plain = model.merge_and_unload()
        torch.testing.assert_close(plain(ids()).logits, logits, rtol=2e-4, atol=2e-4)
    assert not any(isinstance(module, LoraLayer) for module in plain.modules())
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert plain.state_dict().keys() == llama().state_dict().keys()


def test_safe_merge_refuses_what_is_not_finite() -> None:
    model = get_peft_model(mlp(), config(target_modules=["0"]))
    model.base_model.model[0].lora_B["default"].weight.data.fill_(float("nan"))
    before = model.base_model.model[0].base_layer.weight.clone()
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(model.base_model.model[0].base_layer.weight, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_unmerge_is_exact_in_half_precision(dtype: torch.dtype) -> None:
    model = get_peft_model(llama().to(dtype), config())
    perturb(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.merge_adapter()
    model.unmerge_adapter()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_tied_head_shares_the_embeddings_adapter() -> None:
    model = get_peft_model(llama(), config(embeddings="lora"))
    perturb(model)
    embedding = model.base_model.model.model.embed_tokens
    A, B = embedding.lora_embedding_A["default"], embedding.lora_embedding_B["default"]
    E = embedding.lora_beta["default"].value * embedding.base_layer.weight + embedding.scaling["default"] * (
        A.t() @ B.t()
    )
    torch.testing.assert_close(embedding(ids()), E[ids()])
    hidden = torch.randn(2, 7, 32)
    torch.testing.assert_close(model.base_model.model.lm_head(hidden), hidden @ E.t(), rtol=1e-4, atol=1e-5)
    loss = model(input_ids=ids(), labels=ids()).loss
    loss.backward()
    assert embedding.lora_beta["default"].value.grad is not None and A.grad is not None and B.grad is not None


def test_adapter_start() -> None:
    model = get_peft_model(llama(), config())
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    bound = 32**-0.5
    assert not B.any() and A.abs().max() <= bound * 1.0001 and abs(A.std() - bound / 3**0.5) < 0.3 * bound
    again = get_peft_model(llama(), config(init_lora_weights=False)).base_model.model.model.layers[0].self_attn.q_proj
    assert torch.equal(again.lora_A["default"].weight, A) and again.lora_B["default"].weight.any()
    other = get_peft_model(llama(), config(adapter_seed=1)).base_model.model.model.layers[0].self_attn.q_proj
    assert not torch.equal(other.lora_A["default"].weight, A)
    assert torch.equal(other.base_layer.weight, layer.base_layer.weight)
