"""RandLoRA and NOLA: the formulas of their papers, written out, against what layers compute."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.randlora import RandLoraConfig
from tiny import SOURCES, config, ids, llama, logits, perturb
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from hf_lottalora import LottaLoraConfig, cost_report, make_plan
from hf_lottalora.layers.bases import SIDE, basis
from hf_lottalora.layers.nola import bases_of
from hf_lottalora.layers.randlora import folds
from hf_lottalora.scaffold.tensor import ScaffoldTensor

SHAPES = {"O > I": (12, 20), "O < I": (20, 12), "O = I": (12, 12)}  # I, O; d = 12, which 5 does not divide
FAMILIES = ("uniform", "normal", "binary", "ternary")


def adapted(base: nn.Module, dtype: torch.dtype = torch.float64, **changes: Any) -> tuple[PeftModel, Any]:
    """A model of one adapted layer, with values that no start has."""
    torch.manual_seed(0)
    settings = {"r": 5, "target_modules": ["0"], "redraw": "none", "save_kept": True, **changes}
    model = get_peft_model(nn.Sequential(base).to(dtype), config(**settings), autocast_adapter_dtype=False)
    perturb(model)
    return model, model.base_model.model[0]


def randlora_update(layer: Any, inputs: int, outputs: int, r: int = 5, family: str = "uniform") -> torch.Tensor:
    """sum_j B_j diag(lambda_j) A diag(gamma_j), or for O < I its transpose: `(O, I)`."""
    d, D = sorted((inputs, outputs))
    n = math.ceil(d / r)
    lam, gamma = layer.lora_B["default"].value, layer.lora_A["default"].value
    assert lam.shape == (n, r) and gamma.shape == (n, d)
    rows = {name: ScaffoldTensor(f"randlora.{name}", (SIDE, SIDE), 42, family) for name in ("A", "B")}
    A = torch.stack([rows["A"].draw_slice(i * SIDE, i * SIDE + d, torch.float64) for i in range(r)])
    B = torch.stack([rows["B"].draw_slice(i * SIDE, i * SIDE + n * r, torch.float64) for i in range(D)])
    total: Any = sum(B[:, j * r : (j + 1) * r] @ lam[j].diag() @ A @ gamma[j].diag() for j in range(n))
    return total if outputs >= inputs else total.t()


def nola_update(layer: Any, inputs: int, outputs: int, shared: bool, r: int = 5, k: int = 7) -> torch.Tensor:
    """(sum_j b_j B_j) (A0 + sum_i a_i A_i), bases U(-1, 1) / sqrt(k)."""
    a, b = layer.lora_A["default"].value, layer.lora_B["default"].value
    assert a.shape == b.shape == (k,)
    factors = []
    for name, shape, coefficients in (("A", (r, inputs), a), ("B", (outputs, r), b)):
        m = math.prod(shape)
        spec = ScaffoldTensor(f"nola.{name}.{m}" if shared else f"0.nola.{name}", (SIDE, m), 42, "uniform")
        unit = torch.stack([spec.draw_slice(i * m, (i + 1) * m, torch.float64).view(shape) for i in range(k)])
        factors.append(torch.einsum("i,iab->ab", coefficients, unit * (1 / math.sqrt(3) / math.sqrt(k))))
    start = ScaffoldTensor("0.lora_A.weight", (r, inputs), 42, "uniform", 1 / math.sqrt(3 * inputs))
    return factors[1] @ (factors[0] + start.draw(torch.float64))


def update_of(source: str, layer: Any, inputs: int, outputs: int, family: str = "uniform") -> torch.Tensor:
    if source == "randlora":
        return randlora_update(layer, inputs, outputs, family=family)
    return nola_update(layer, inputs, outputs, "shape" in source)


def weight_of(layer: Any) -> torch.Tensor:
    W = layer.base_layer.weight
    return W.t() if isinstance(layer.base_layer, Conv1D) else W


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [2, 200])
@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_values_and_gradients_are_the_formula_s(source: str, shape: str, rows: int, kind: str) -> None:
    inputs, outputs = SHAPES[shape]
    assert folds(rows, outputs, inputs, 15) == (rows == 200)  # both ways of RandLoRA
    base = nn.Linear(inputs, outputs) if kind == "Linear" else Conv1D(outputs, inputs)
    model, layer = adapted(base, **SOURCES[source])
    x = torch.randn(rows, inputs, dtype=torch.float64, requires_grad=True)
    beta, scaling, bias = layer.lora_beta["default"].value, layer.scaling["default"], base.bias.detach()
    wanted = [x, beta, layer.lora_A["default"].value, layer.lora_B["default"].value]
    grad = torch.randn(rows, outputs, dtype=torch.float64)
    y = model(x)
    expected = x @ (beta * weight_of(layer) + scaling * update_of(source, layer, inputs, outputs)).t() + bias
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    for one, other in zip(
        torch.autograd.grad(y, wanted, grad), torch.autograd.grad(expected, wanted, grad), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rows", [2, 200])
@pytest.mark.parametrize("shape", SHAPES)
def test_first_and_second_derivatives_of_randlora(shape: str, rows: int) -> None:
    inputs, outputs = (size // 4 for size in SHAPES[shape])
    model, _ = adapted(nn.Linear(inputs, outputs), adapter="randlora", r=2)
    parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters() if p.requires_grad}
    x = torch.randn(rows // 20 or 1, inputs, dtype=torch.float64, requires_grad=True)

    def function(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (x, *parameters.values()))
    assert torch.autograd.gradgradcheck(function, (x, *parameters.values()))


@pytest.mark.parametrize("shape", SHAPES)
def test_peft_s_randlora_is_reproduced_with_its_bases(shape: str) -> None:
    """PEFT numbers B's columns by (j, b) and U's rows by (b, j): column c of B meets row c of U."""
    inputs, outputs = SHAPES[shape]
    base = nn.Linear(inputs, outputs)
    model, layer = adapted(copy.deepcopy(base), torch.float32, adapter="randlora", r=4, lora_alpha=40)
    settings = RandLoraConfig(r=4, randlora_alpha=40, target_modules=["0"])
    theirs = get_peft_model(nn.Sequential(copy.deepcopy(base)), settings)
    peer: Any = theirs.base_model.model[0]
    lam, gamma = peer.randlora_lambda["default"], peer.randlora_gamma["default"]  # (r, n) and (n, d)
    with torch.no_grad():
        lam.normal_(), gamma.normal_()
        layer.lora_beta["default"].value.fill_(1)
        d, D, n = 12, max(inputs, outputs), 3
        A = peer.randlora_A["default"][:, 0, :d]  # (r, d)
        B = peer.randlora_B["default"][:D, :n].reshape(D, -1)  # (D, n r)
        U = torch.einsum("bj,bi,ji->bji", lam, A, gamma).reshape(-1, d)  # rows b n + j
        delta = B @ U if outputs >= inputs else (B @ U).t()
        x = torch.randn(3, inputs)
        torch.testing.assert_close(theirs(x), base(x) + 10 * (x @ delta.t()), rtol=1e-4, atol=1e-4)
        # The same numbers through ours: its bases in ours' places, rows of U by (j, b).
        layer.sources["default"].small = Given(A)
        columns = [b * n + j for j in range(n) for b in range(4)]
        layer.sources["default"].large = Given(B[:, columns])
        layer.lora_B["default"].value.copy_(lam.t())
        layer.lora_A["default"].value.copy_(gamma)
        torch.testing.assert_close(model(x), theirs(x), rtol=1e-4, atol=1e-4)
    assert layer.scaling["default"] == peer.scaling["default"] == 10


class Given:
    """A basis with these values."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    def corner(self, rows: int, columns: int, dtype: torch.dtype, like: torch.Tensor) -> torch.Tensor:
        assert self.values.shape == (rows, columns)
        return self.values.to(dtype)


@pytest.mark.parametrize("source", SOURCES)
def test_there_is_no_update_at_the_start_and_gradients_come(source: str) -> None:
    base = nn.Linear(12, 20)
    settings = config(r=5, target_modules=["0"], redraw="none", **SOURCES[source])
    model = get_peft_model(nn.Sequential(copy.deepcopy(base)), settings)
    x = torch.randn(3, 12)
    torch.testing.assert_close(model(x), base(x))
    model(x).square().sum().backward()
    layer: Any = model.base_model.model[0]
    assert layer.lora_B["default"].value.grad.abs().max() > 0
    if source == "randlora":
        assert torch.all(layer.lora_A["default"].value == 1 / 12)  # 1 / min(O, I)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    names = ("gamma", "lambda") if source == "randlora" else ("coefficients", "coefficients")
    prefix = "base_model.model.0.lora_"
    expected = {f"{prefix}A.default.{names[0]}", f"{prefix}B.default.{names[1]}", f"{prefix}beta.default.norm"}
    assert trained == expected
    own = {"base_model.model.0.base_layer.weight", "base_model.model.0.base_layer.bias"}
    assert model.state_dict().keys() == expected | own  # no basis and no A0 anywhere
    assert not dict(model.named_buffers())


@pytest.mark.parametrize("family", FAMILIES)
def test_any_family_of_bases(family: str) -> None:
    model, layer = adapted(nn.Linear(12, 20), adapter="randlora", basis_family=family)
    x = torch.randn(3, 12, dtype=torch.float64)
    update = update_of("randlora", layer, 12, 20, family)
    expected = layer.base_layer(x) + x @ ((layer.lora_beta["default"].value - 1) * layer.base_layer.weight).t()
    torch.testing.assert_close(model(x), expected + layer.scaling["default"] * x @ update.t())


@pytest.mark.parametrize("source", SOURCES)
def test_merging_equals_forward_and_unmerging_is_to_the_bit(source: str) -> None:
    model, layer = adapted(nn.Linear(12, 20), **SOURCES[source])
    x, before = torch.randn(3, 12, dtype=torch.float64), layer.base_layer.weight.clone()
    y = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), y)
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, before)
    torch.testing.assert_close(layer.get_delta_weight("default") + before, model.merge_and_unload()[0].weight)


CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "1d": lambda: nn.Conv1d(6, 10, 3, padding=1),
    "2d": lambda: nn.Conv2d(6, 10, 3, stride=2, padding=1),
    "2d by 1": lambda: nn.Conv2d(10, 6, 1),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_convolutions(source: str, kind: str, dropout: float) -> None:
    base = CONVOLUTIONS[kind]()
    model, layer = adapted(base, lora_dropout=dropout, **SOURCES[source])
    x = torch.randn(2, base.in_channels, *[8 for _ in base.kernel_size], dtype=torch.float64)
    model.eval()
    inputs, outputs = base.weight[0].numel(), base.weight.shape[0]
    update = update_of(source, layer, inputs, outputs).view(base.weight.shape)
    kernel = layer.lora_beta["default"].value * base.weight + layer.scaling["default"] * update
    torch.testing.assert_close(model(x), base._conv_forward(x, kernel, base.bias))
    model.train()(x).sum().backward()
    assert layer.lora_A["default"].value.grad is not None


def test_nola_on_a_convolution_with_groups() -> None:
    base = nn.Conv2d(8, 8, 3, groups=4)
    model, layer = adapted(base, adapter="nola", bases=7, r=4)
    A, B = layer._pair("default")
    assert A.shape == (4, 2, 3, 3) and B.shape == (8, 1, 1, 1)
    model(torch.randn(1, 8, 5, 5, dtype=torch.float64)).sum().backward()


@pytest.mark.parametrize("magnitude", ["outputs", "inputs"])
@pytest.mark.parametrize("source", SOURCES)
def test_dora_over_them(source: str, magnitude: str) -> None:
    model, layer = adapted(nn.Linear(12, 20), use_dora=True, dora_magnitude=magnitude, **SOURCES[source])
    W, s, beta = layer.base_layer.weight, layer.scaling["default"], layer.lora_beta["default"].value
    total = beta * W + s * update_of(source, layer, 12, 20)
    size = layer.lora_magnitude["default"].value
    factor = (size / total.norm(dim=1)).unsqueeze(1) if magnitude == "outputs" else size / total.norm(dim=0)
    x = torch.randn(3, 12, dtype=torch.float64)
    torch.testing.assert_close(model(x), x @ (total * factor).t() + layer.base_layer.bias)


def test_several_adapters_of_several_kinds_together() -> None:
    model, layer = adapted(nn.Linear(12, 20), adapter="randlora", r=5)
    others = {
        "nola": {"adapter": "nola", "bases": 7, "r": 3},
        "again": {"adapter": "randlora", "r": 4},
        "plain": {"r": 2},
    }
    for name, changes in others.items():
        settings = config(target_modules=["0"], redraw="none", save_kept=True, **changes)
        model.add_adapter(name, settings)
        for parameter in layer.adapter_parameters(name):
            parameter.data = torch.randn_like(parameter, dtype=torch.float64)
    x = torch.randn(4, 12, dtype=torch.float64)
    names = ["default", *others]
    W, alone, deltas = layer.base_layer.weight, {}, {}
    for name in names:
        model.set_adapter(name)
        alone[name], deltas[name] = model(x), layer.get_delta_weight(name)
        torch.testing.assert_close(alone[name], x @ (W + deltas[name]).t() + layer.base_layer.bias)
    model.base_model.set_adapter(names)
    torch.testing.assert_close(model(x), x @ (W + sum(deltas.values())).t() + layer.base_layer.bias)
    mixed = model.eval()(x, adapter_names=names)
    torch.testing.assert_close(mixed, torch.stack([alone[name][i] for i, name in enumerate(names)]))
    model.delete_adapter("nola")
    assert "nola" not in layer.sources


@pytest.mark.parametrize("source", SOURCES)
def test_a_layer_s_update_depends_on_no_other_layer(source: str) -> None:
    def update(targets: list[str]) -> torch.Tensor:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 40), nn.Linear(40, 12))
        model = get_peft_model(net, config(r=5, target_modules=targets, redraw="none", **SOURCES[source]))
        layer: Any = model.base_model.model[1]
        layer.lora_A["default"].value.data.fill_(0.5)
        layer.lora_B["default"].value.data.fill_(0.25)
        A, B = layer._pair("default")
        return B @ A

    torch.testing.assert_close(update(["1"]), update(["0", "1", "2", "3"]), rtol=1e-6, atol=1e-7)


def test_a_smaller_part_of_a_basis_is_the_corner_of_a_larger_one() -> None:
    like = torch.empty(())
    small = basis("test.small", 1, "normal").corner(3, 5, torch.float32, like).clone()
    large = basis("test.small", 1, "normal").corner(40, 70, torch.float32, like)
    assert torch.equal(small, large[:3, :5]) and abs(float(large.std()) - 1) < 0.05
    half = basis("test.small", 1, "normal").corner(3, 5, torch.bfloat16, like)
    assert torch.equal(half, small.to(torch.bfloat16))


def test_the_bases_of_files_that_are_out_there() -> None:
    """Names, tables and places of bases are no part of a file: what these draw must never change."""
    drawn = [basis(f"randlora.{name}", 42, family).spec for name in "AB" for family in ("uniform", "binary")]
    drawn += [
        bases_of("A", None, 2048, 42, "uniform", 256).spec,
        bases_of("B", "layers.0.q", 2048, 42, "binary", 1).spec,
    ]
    assert [spec.digest() for spec in drawn] == [
        "667350bd991e77b0ba729345fd45c73f", "9241cdacfa31c81bb5840837882f223b", "b0675d4a337357698e4d6c43d527446a",
        "4c8a6e68865829a3839f07f079f9e2a0", "cda150a3f745fc03982a2480c3debd50", "485c7b6f48423f932fe102f9f349ef68",
    ]  # fmt: skip
    corner = basis("randlora.B", 42, "uniform").corner(2, 3, torch.float32, torch.empty(()))
    assert corner.tolist() == [
        [1.3140761852264404, -1.0013682842254639, 1.6914294958114624],
        [0.4385892152786255, 0.9832379817962646, 0.13264714181423187],
    ]
    # Two by hand: NOLA's bases are rows of m elements, RandLoRA's rows of 2**20.
    (values,) = bases_of("A", None, 6, 42, "uniform", 3).blocks(torch.empty(()))
    whole = ScaffoldTensor("nola.A.6", (SIDE, 6), 42, "uniform").draw_slice(0, 18)
    assert torch.equal(values[1].flatten(), whole)


def trained_llama(source: str, **changes: Any) -> PeftModel:
    model = get_peft_model(llama(), config(task_type="CAUSAL_LM", **SOURCES[source], **changes))
    perturb(model)
    return model


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(source: str, reentrant: bool) -> None:
    found = []
    for checkpointed in (False, True):
        model = trained_llama(source)
        if checkpointed:
            model.enable_input_require_grads()
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()(input_ids=ids(), labels=ids()).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("residency", ["packed", "streamed"])
def test_residencies_compute_the_same_to_the_bit(source: str, residency: str) -> None:
    for length in (2, 60):
        found = []
        for held in ("dense", residency):
            model = trained_llama(source, family="binary", residency=held)
            tokens = ids(2, length)
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("source", SOURCES)
def test_autocast(source: str) -> None:
    model = trained_llama(source, lora_alpha=1)
    exact = model(input_ids=ids(2, 30)).logits
    with torch.autocast("cpu", torch.bfloat16):
        found = model(input_ids=ids(2, 30)).logits
    assert (found.float() - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("source", SOURCES)
def test_a_copy_and_a_pickle_have_values_of_their_own(source: str) -> None:
    model = trained_llama(source)
    before = logits(model)
    twin = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (twin, torch.load(buffer, weights_only=False)):
        assert torch.equal(logits(other), before)
        perturb(other)
        assert not torch.allclose(logits(other), before) and torch.equal(logits(model), before)


def test_nola_makes_its_factors_again_only_when_coefficients_have_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_lottalora.layers import nola

    made = []
    forward = nola.Combined.apply
    monkeypatch.setattr(nola.Combined, "apply", lambda *args: made.append(len(args) - 2) or forward(*args))
    model = trained_llama("nola by shape")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # steps that gather two batches: one making for each, A and B of the one shape there is
        for _ in range(2):
            model(input_ids=ids(), labels=ids()).loss.backward()
        assert sorted(made) == [8, 8]
        made.clear()
        optimizer.step()
    logits(model), logits(model)
    assert sorted(made) == [8, 8]
    made.clear()
    with torch.no_grad():
        next(m for m in model.modules() if getattr(m, "sources", None)).lora_A[
            "default"
        ].value.data += 1  # past autograd
    logits(model)
    assert sorted(made) == [8]


def test_gradients_of_gathered_batches_add_up() -> None:
    model = trained_llama("nola by shape")
    losses = [model(input_ids=ids(2, n), labels=ids(2, n)).loss for n in (5, 9)]
    together = torch.autograd.grad(sum(losses), [p for p in model.parameters() if p.requires_grad])
    for n in (5, 9):
        model(input_ids=ids(2, n), labels=ids(2, n)).loss.backward()
    for p, expected in zip((p for p in model.parameters() if p.requires_grad), together, strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-4, atol=1e-5)


def test_inference_mode_before_training() -> None:
    model = trained_llama("nola by shape")
    with torch.inference_mode():
        model(input_ids=ids())
    model(input_ids=ids(), labels=ids()).loss.backward()
    model.set_requires_grad("default", False)
    with torch.inference_mode():
        model(input_ids=ids())
    model.base_model.model.get_input_embeddings().weight.requires_grad_(True)
    model(input_ids=ids(), labels=ids()).loss.backward()


def test_a_layer_alone_under_checkpoint() -> None:
    _, layer = adapted(nn.Linear(12, 20), adapter="nola", bases=7)
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert layer.lora_B["default"].value.grad.abs().max() > 0


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled(source: str) -> None:
    model, _ = adapted(nn.Linear(12, 20), torch.float32, **SOURCES[source])
    whole = source == "randlora"  # whether coefficients have changed is asked outside the graph
    for rows in (2, 200):
        x = torch.randn(rows, 12)
        model(x)  # draws the bases
        compiled = torch.compile(model, fullgraph=whole, backend="aot_eager")
        found = [torch.autograd.grad(f(x).square().sum(), [p for p in model.parameters() if p.requires_grad])
                 for f in (model, compiled)]  # fmt: skip
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("source", SOURCES)
def test_costs_are_counted(source: str) -> None:
    model = trained_llama(source)
    for length in (5, 60):
        report = cost_report(model, {"input_ids": ids(2, length), "labels": ids(2, length)})
        assert report.flops_counted is not None and report.flops is not None
        assert report.flops_counted > report.flops / 2


@pytest.mark.parametrize("source", SOURCES)
def test_multihead_attention(source: str) -> None:
    net = nn.Sequential()
    net.add_module("attention", nn.MultiheadAttention(16, 2))
    model = get_peft_model(net, config(target_modules=["attention"], redraw="none", **SOURCES[source]))
    perturb(model)
    attention: Any = model.base_model.model.attention
    x = torch.randn(3, 2, 16)
    y = attention(x, x, x)[0]
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.merge_adapter()
    torch.testing.assert_close(attention(x, x, x)[0], y, rtol=1e-4, atol=1e-4)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"adapter": "vera"}, r"adapter must be one of \['lora', 'randlora', 'nola'\], got 'vera'"),
    "no bases": ({"adapter": "nola", "bases": 0}, "bases must be a positive integer"),
    "bases of LoRA": ({"bases": 4}, "bases=4 is for adapter='nola', and this is adapter='lora'"),
    "bases of RandLoRA": ({"adapter": "randlora", "bases": 4}, "bases=4 is for adapter='nola'"),
    "shared by LoRA": ({"bases_shared": "layer"}, "bases_shared='layer' is for adapter='nola'"),
    "family of LoRA": ({"basis_family": "binary"}, "basis_family='binary' is for adapter='randlora' or 'nola'"),
    "unknown family": ({"adapter": "nola", "basis_family": "gauss"}, "gauss"),
    "matrix family": ({"adapter": "nola", "basis_family": "orthogonal"}, "drawn element by element"),
    "zero family": ({"adapter": "randlora", "basis_family": "zero"}, "drawn element by element"),
    "another start": ({"adapter": "nola", "init_lora_weights": False}, "init_lora_weights=False is for adapter='lora'"),
    "rsLoRA": ({"adapter": "randlora", "use_rslora": True}, "use_rslora=True is for adapter='lora'"),
    "embeddings": ({"adapter": "randlora", "embeddings": "lora"}, "embeddings='lora' is for adapter='lora'"),
}


@pytest.mark.parametrize("case", BAD)
def test_options_that_do_not_fit(case: str) -> None:
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        config(**options)


@pytest.mark.parametrize("source", SOURCES)
def test_embeddings_and_grouped_convolutions_are_refused_by_name(source: str) -> None:
    net = nn.Sequential(nn.Embedding(9, 12), nn.Linear(12, 12))
    with pytest.raises(ValueError, match="'0' is one"):
        get_peft_model(net, config(target_modules=["0"], embeddings="frozen", redraw="none", **SOURCES[source]))
    if source == "randlora":
        with pytest.raises(ValueError, match="groups=2"):
            get_peft_model(
                nn.Sequential(nn.Conv1d(4, 4, 3, groups=2)), config(target_modules=["0"], adapter="randlora")
            )


def test_a_layer_larger_than_the_bases_is_refused() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(2, SIDE), nn.Linear(SIDE + 1, 2))
    for path, refused in (("0", False), ("1", True)):
        settings = config(target_modules=[path], redraw="none", adapter="randlora")
        with pytest.raises(ValueError, match="'1' has 1,048,577 inputs") if refused else nullcontext():
            make_plan(net, settings)


def test_what_alpha_is_by_default() -> None:
    assert config(r=4).lora_alpha == 8
    assert config(r=4, adapter="randlora").lora_alpha == 80
    assert config(r=4, adapter="nola").lora_alpha == 4
    assert config(r=4, adapter="randlora", lora_alpha=1).lora_alpha == 1
    assert {"adapter", "bases", "basis_family", "bases_shared"}.isdisjoint(
        config().to_dict()
    )  # files of LoRA are as before
    assert LottaLoraConfig(seed=1, adapter="nola").to_dict()["bases"] == 256
