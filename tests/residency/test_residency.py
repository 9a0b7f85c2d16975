"""Packed and streamed weights: the dense ones to the bit, in every operation, for every life of a model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import bert, config, gpt2, ids, llama, logits, mlp, perturb
from torch import nn
from torch.nn import functional as F
from transformers import MixtralConfig, MixtralForCausalLM

from hf_lottalora import AutoLottaLoraModelForCausalLM, ScaffoldTensor, beta_report, cost_report
from hf_lottalora.residency import virtual_weight
from hf_lottalora.residency.forms import VirtualWeight, resident

FAMILIES = ["normal", "normal_8bit", "normal_4bit", "ternary", "binary"]
MODES = ["packed", "streamed"]
HALF = torch.bfloat16


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["whole", "chunks"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "chunks":
        monkeypatch.setattr(virtual_weight, "CHUNK", 100)


def pair(mode: Any, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The same scaffold tensor dense and not."""
    settings = {"name": "a.weight", "shape": (24, 40), "seed": 1, "family": "normal_4bit", "scale": 0.2}
    scaffold = ScaffoldTensor(**{**settings, **changes})
    return resident(scaffold, "dense", dtype), resident(scaffold, mode, dtype)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "casts",
    [[torch.float32], [HALF], [torch.float32, HALF], [HALF, torch.float16, torch.float32], [torch.float64, HALF]],
)
def test_values_are_those_of_a_dense_weight_through_all_casts(family: str, casts: Any, mode: str) -> None:
    dense, virtual = pair(mode, casts[0], family=family, zero_row=3)
    for dtype in casts[1:]:
        dense, virtual = dense.to(dtype), virtual.to(dtype)
    assert isinstance(virtual, VirtualWeight) and virtual.dtype == dense.dtype and virtual.shape == dense.shape
    assert torch.equal(virtual.dense(), dense) and torch.equal(virtual.t().dense(), dense.t())
    assert torch.equal(torch.cat([values.clone() for _, _, values in virtual.row_chunks()]), dense)


OPERATIONS: dict[str, tuple[tuple[int, ...], tuple[int, ...], Callable[..., torch.Tensor]]] = {
    "linear": ((24, 40), (3, 5, 40), lambda x, W: F.linear(x, W)),
    "linear with bias": ((24, 40), (7, 40), lambda x, W: F.linear(x, W, torch.arange(24.0).to(x.dtype))),
    "of a vector": ((24, 40), (40,), lambda x, W: F.linear(x, W)),
    "Conv1D": ((24, 40), (7, 24), lambda x, W: torch.addmm(torch.arange(40.0).to(x.dtype), x, W)),
    "matmul": ((24, 40), (2, 7, 24), lambda x, W: x @ W),
    "convolution": ((24, 8, 3, 3), (2, 8, 6, 6), lambda x, W: F.conv2d(x, W, padding=1)),
    "an expert": ((4, 24, 40), (7, 40), lambda x, W: F.linear(x, W[2])),
    "elementwise": ((24, 40), (24, 40), lambda x, W: x * W.square()),
    "no rows": ((24, 40), (0, 40), lambda x, W: F.linear(x, W)),
}


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, HALF])
def test_operations_and_their_gradients(operation: str, dtype: torch.dtype, mode: str) -> None:
    shape, x_shape, function = OPERATIONS[operation]
    results = []
    for weight in pair(mode, dtype, shape=shape):
        x = torch.randn(x_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
        y = function(x.requires_grad_(), weight)
        results.append((y, *torch.autograd.grad(y.float().square().sum(), x)))
    for dense, virtual in zip(*results, strict=True):
        assert dense.dtype == virtual.dtype and dense.shape == virtual.shape
        tolerance = 1e-2 if dtype == HALF else 1e-12  # parts of a sum are rounded one by one
        assert (virtual - dense).norm() <= tolerance * dense.norm()


def test_rows_of_a_table(mode: str) -> None:
    dense, virtual = pair(mode, shape=(50, 6), zero_row=3)
    rows = torch.tensor([[3, 49, 0], [7, 7, 3]])
    assert torch.equal(F.embedding(rows, virtual, 3), F.embedding(rows, dense, 3))
    assert torch.equal(F.embedding(rows[:0], virtual, 3), F.embedding(rows[:0], dense, 3))


def test_nothing_writes_to_it(mode: str) -> None:
    _, virtual = pair(mode)
    writes = [lambda: virtual.zero_(), lambda: virtual.mul_(2), lambda: virtual.copy_(torch.ones(24, 40))]
    for write in [*writes, lambda: virtual.__setitem__(0, 1.0)]:
        with pytest.raises(RuntimeError, match=r"would write to a scaffold weight that is not in memory. Call set_res"):
            write()


def mixtral() -> MixtralForCausalLM:
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads))


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "llama": (llama, {"embeddings": "frozen"}),
    "llama, embeddings adapted": (llama, {"embeddings": "lora", "family": "binary"}),
    "gpt2": (gpt2, {"embeddings": "frozen", "family": "normal_4bit"}),
    "bert": (bert, {"target_modules": "all-linear", "use_dora": True}),
    "mixtral": (mixtral, {"family": "normal_2bit"}),
}


def forward_and_gradients(model: nn.Module) -> list[torch.Tensor]:
    model.zero_grad()
    output = model.train()(input_ids=ids())
    output.logits.float().square().mean().backward()
    return [output.logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def dense_bytes(model: nn.Module) -> int:
    """Bytes of frozen parameters that are in memory."""
    return sum(p.nbytes for p in model.parameters() if not p.requires_grad and not isinstance(p, VirtualWeight))


@pytest.mark.filterwarnings("ignore:.*dropout")
@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_the_same_to_the_bit(name: str, mode: str, tmp_path: Path) -> None:
    build, options = MODELS[name]
    settings = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if name == "bert" else {}
    settings = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if name == "gpt2" else settings
    dense = get_peft_model(build(**settings), config(**options))
    other = get_peft_model(build(**settings), config(**options, residency=mode))
    perturb(dense)
    perturb(other)
    virtual = [p for p in other.parameters() if isinstance(p, VirtualWeight)]
    assert len(virtual) >= 8 and {p.residency for p in virtual} == {mode}
    assert sum(p.numel() for p in virtual) == sum(spec.numel for spec in other.get_plan().scaffold.values())
    for expected, found in zip(forward_and_gradients(dense), forward_and_gradients(other), strict=True):
        assert torch.equal(found, expected)
    other.gradient_checkpointing_enable()
    other.enable_input_require_grads()
    forward_and_gradients(other)
    other.disable_input_require_grads()
    other.gradient_checkpointing_disable()
    # Switching, in all directions, and what it costs.
    for step in ("dense", mode, "streamed", "packed", "streamed", "dense"):
        other.set_residency(step)
        assert other.residency == step and torch.equal(logits(other), logits(dense))
    assert not any(isinstance(p, VirtualWeight) for p in other.parameters())
    assert dense_bytes(other) == dense_bytes(dense)
    other.set_residency(mode)
    # Saving and loading.
    other.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(**settings), tmp_path)
    assert again.residency == mode and torch.equal(logits(again), logits(dense))


def test_loading_from_the_artifact_alone(mode: str, tmp_path: Path) -> None:
    model = get_peft_model(llama(), config(embeddings="frozen"))
    perturb(model)
    model.save_pretrained(tmp_path)
    again = AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path, residency=mode)
    weights = dict(again.named_parameters())
    virtual = {name for name, weight in weights.items() if isinstance(weight, VirtualWeight)}
    assert again.residency == mode and len(virtual) == len(again.get_plan().scaffold)
    assert torch.equal(logits(again), logits(model))
    again.generate(ids(), max_new_tokens=2, do_sample=False)
    with pytest.raises(ValueError, match="residency must be one of"):
        AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path, residency="none")


def test_what_it_was_switched_to_is_saved(mode: str, tmp_path: Path) -> None:
    model = get_peft_model(llama(), config())
    model.set_residency(mode)
    model.save_pretrained(tmp_path)
    assert AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path).residency == mode


def test_lives_of_a_model(mode: str) -> None:
    dense = get_peft_model(llama(), config(embeddings="frozen"))
    model = get_peft_model(llama(), config(embeddings="frozen", residency=mode))
    perturb(dense)
    perturb(model)
    expected = logits(dense)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), expected) and dense_bytes(twin) == 0
    with model.disable_adapter(), dense.disable_adapter():
        assert torch.equal(logits(model), logits(dense))
    with model.scaffold_seed(43), dense.scaffold_seed(43):
        assert torch.equal(logits(model), logits(dense)) and not torch.equal(logits(model), expected)
    with model.scaffold_off(), dense.scaffold_off():
        torch.testing.assert_close(logits(model), logits(dense))
    assert torch.equal(logits(model), expected)
    model.verify_scaffold(full=True)
    model.half()
    dense.half()
    assert dense_bytes(model) == 0 and torch.equal(logits(model), logits(dense))


def test_merging_needs_memory_until_it_is_undone(mode: str) -> None:
    model = get_peft_model(llama(), config(residency=mode))
    perturb(model)
    expected = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="Adapters are merged into the scaffold"):
        model.set_residency(mode)
    model.unmerge_adapter()
    assert model.residency == mode and torch.equal(logits(model), expected)
    assert sum(isinstance(p, VirtualWeight) for p in model.parameters()) == len(model.get_plan().scaffold)
    model.merge_adapter()
    with model.disable_adapter():  # as in PEFT, layers that run now are unmerged
        logits(model)
    assert torch.equal(logits(model), expected)
    assert sum(isinstance(p, VirtualWeight) for p in model.parameters()) == len(model.get_plan().scaffold)
    merged = model.merge_and_unload()
    assert not any(isinstance(p, VirtualWeight) for p in merged.parameters())
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)


def test_autograd_keeps_no_dense_weight(mode: str) -> None:
    model = get_peft_model(llama(), config(embeddings="frozen", residency=mode))
    shapes = {tuple(p.shape) for p in model.parameters() if isinstance(p, VirtualWeight)}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(input_ids=ids())
    weights = [t for t in kept if tuple(t.shape) in shapes or tuple(t.shape[::-1]) in shapes]
    assert weights and all(isinstance(t, VirtualWeight) for t in weights)


def test_packed_binary_takes_a_sixteenth_of_bfloat16() -> None:
    model = get_peft_model(mlp().to(HALF), config(target_modules=["0", "2"], family="binary", residency="packed"))
    for layer in (model.base_model.model[0], model.base_model.model[2]):
        weight = layer.base_layer.weight
        assert 16 * weight.words.nbytes == 2 * weight.numel()


@pytest.mark.parametrize("family", ["binary", "ternary"])
@pytest.mark.parametrize("dtype", [torch.float32, HALF, torch.float16, torch.float64])
@pytest.mark.parametrize("rows", [1, 16, 17])
def test_int4_kernel(family: str, dtype: torch.dtype, rows: int) -> None:
    dense, virtual = pair("int4", dtype, shape=(48, 96), family=family, zero_row=5)
    assert virtual.residency == "int4" and virtual.codes.nbytes == dense.numel() // 2
    assert torch.equal(virtual.dense(), dense)
    x = torch.randn(rows, 96, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    bias = torch.arange(48).to(dtype)
    results = []
    for weight in (dense, virtual):
        y = F.linear(x, weight, bias)
        results.append((y, *torch.autograd.grad(y.float().square().sum(), x)))
    for expected, found in zip(*results, strict=True):
        assert found.dtype == dtype and (found - expected).norm() <= 4 * torch.finfo(dtype).eps * expected.norm()


def test_int4_model() -> None:
    dense = get_peft_model(llama(), config(embeddings="frozen", family="binary"))
    model = get_peft_model(llama(), config(embeddings="frozen", family="binary", residency="int4"))
    perturb(dense)
    perturb(model)
    held = [p.residency for p in model.parameters() if isinstance(p, VirtualWeight)]
    # 99 rows of the embedding are not 16 n, and 48 inputs of down_proj not 32 n.
    assert held.count("int4") == 12 and held.count("packed") == 3
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(logits(each), logits(dense), rtol=1e-4, atol=1e-5)
        each.verify_scaffold(full=True)
    with model.scaffold_seed(43), dense.scaffold_seed(43):
        torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-5)
    with model.scaffold_off(), dense.scaffold_off():
        torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-5)
    model.set_residency("dense")
    assert torch.equal(logits(model), logits(dense))


def test_int4_is_for_three_values() -> None:
    with pytest.raises(ValueError, match="residency='int4' is for weights of at most three values .* not 'normal'"):
        config(residency="int4")
    model = get_peft_model(llama(), config(family="binary", family_pattern={"q_proj": "normal_4bit"}))
    with pytest.raises(ValueError, match="not 'normal_4bit'. Use 'packed'"):
        model.set_residency("int4")


def test_reports_and_refusals(mode: str) -> None:
    dense = get_peft_model(llama(), config(embeddings="frozen"))
    model = get_peft_model(llama(), config(embeddings="frozen", residency=mode))
    batch = {"input_ids": ids(), "labels": ids()}
    assert str(cost_report(model, batch)) == str(cost_report(dense, batch))
    assert str(beta_report(model)) == str(beta_report(dense))
    model.share_memory()
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="torch.compile needs a scaffold in memory"):
        torch.compile(model, backend="eager", fullgraph=True)(input_ids=ids())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own looking
@pytest.mark.smoke
@pytest.mark.parametrize("mode", ["packed", "streamed"])
def test_compiling_with_graph_breaks_changes_nothing(mode: str) -> None:
    model = get_peft_model(llama(), config(embeddings="frozen", residency=mode))
    found = []
    torch._dynamo.reset()
    for run in (model, torch.compile(model, backend="eager")):
        model.zero_grad()
        loss = run(input_ids=ids(), labels=ids()).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    assert len(found[0]) > 1
    assert all(torch.equal(eager, compiled) for eager, compiled in zip(*found, strict=True))


def test_changed_words_are_found() -> None:
    model = get_peft_model(llama(), config(residency="packed"))
    weight = next(p for p in model.parameters() if isinstance(p, VirtualWeight))
    weight.words[11] ^= 1
    with pytest.raises(ValueError, match="is not what seed 42 draws"):
        model.verify_scaffold(full=True)


def test_unknown_values_are_refused_before_anything_changes() -> None:
    with pytest.raises(ValueError, match="residency must be one of"):
        config(residency="nowhere")
    model = get_peft_model(llama(), config())
    with pytest.raises(ValueError, match="residency must be one of .* got 'nowhere'"):
        model.set_residency("nowhere")
    assert model.residency == "dense"


def test_another_adapters_trained_tensors_stay(mode: str) -> None:
    models = []
    for held in ("dense", mode):
        model = get_peft_model(llama(), config(embeddings="frozen", residency=held))
        model.add_adapter("b", config(embeddings="train", adapter_seed=77))
        model.set_adapter("b")
        models.append(model)
    dense, model = models
    assert torch.equal(logits(model), logits(dense))
    assert not any(isinstance(p, VirtualWeight) for p in model.parameters() if p.requires_grad)
    perturb(dense)
    perturb(model)
    expected = logits(dense)
    for step in ("dense", mode, "packed", mode):
        model.set_residency(step)
        assert torch.equal(logits(model), expected)
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)
    for each in models:
        each.set_adapter("default")
    assert torch.equal(logits(model), logits(dense))


def test_backward_over_a_scaffold_that_changed(mode: str) -> None:
    model = get_peft_model(llama(), config(residency=mode))
    loss = model(input_ids=ids()).logits.square().mean()
    model.set_scaffold_seed(7)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_casts_have_lost_is_noticed(mode: str) -> None:
    model = get_peft_model(llama(), config(embeddings="frozen", residency=mode))
    model.half().float()
    with pytest.raises(ValueError, match="is not what seed 42 draws"):
        model.verify_scaffold()
    model.set_scaffold_seed(9)
    model.verify_scaffold(full=True)
    dense = get_peft_model(llama(), config(embeddings="frozen"))
    dense.half().float()
    with pytest.raises(ValueError, match="is not what seed 42 draws"):
        dense.set_residency(mode)
    with model.scaffold_off(), pytest.raises(ValueError, match="Leave scaffold_off before set_residency"):
        model.set_residency("dense")


def test_rows_that_are_not_there(mode: str) -> None:
    _, virtual = pair(mode, shape=(50, 6))
    for row in (50, -1):
        with pytest.raises(IndexError, match="index out of range"):
            F.embedding(torch.tensor([3, row]), virtual)


@pytest.mark.parametrize("name", MODELS)
def test_inference_mode_and_casts_while_a_graph_lives(name: str, mode: str) -> None:
    build, options = MODELS[name]
    model = get_peft_model(build(), config(**options, residency=mode)).eval()
    expected = model(input_ids=ids()).logits  # its graph stays
    with torch.inference_mode():
        assert torch.equal(model(input_ids=ids()).logits, expected)
    model.to("cpu")
    assert torch.equal(logits(model), expected)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(HALF)
    assert {p.dtype for p in model.parameters() if isinstance(p, VirtualWeight)} == {HALF}
    assert logits(model).dtype == HALF
    model.load_state_dict(model.state_dict())


def test_int4_takes_inputs_of_any_layout() -> None:
    dense, virtual = pair("int4", shape=(48, 96), family="binary")
    x = torch.randn(96, 4, generator=torch.Generator().manual_seed(0)).t()
    torch.testing.assert_close(F.linear(x, virtual), F.linear(x, dense))


def test_a_merge_that_fails_leaves_the_model_as_it_was(mode: str) -> None:
    model = get_peft_model(llama(), config(layer_norm=True, residency=mode))
    with pytest.raises(ValueError, match="have a LayerNorm after the layer"):
        model.merge_and_unload()
    assert sum(isinstance(p, VirtualWeight) for p in model.parameters()) == len(model.get_plan().scaffold)
