"""Adapters on embeddings that `target_modules` names: the literal equation, roles, tied heads, the life of a model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from tiny import bert, config, gpt2, ids, llama, logits, perturb
from torch import nn
from transformers import DebertaConfig, DebertaModel

from hf_lottalora import AutoLottaLoraModelForCausalLM, make_plan

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "dora by input": {"use_dora": True, "dora_magnitude": "inputs"},
}
REDRAW = ("all", "targets", "none")


class Looks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 6, padding_idx=3)
        self.lin = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(self.emb(x))  # type: ignore[no-any-return]


def made(dtype: torch.dtype = torch.float64, targets: tuple[str, ...] = ("emb",), **changes: Any) -> Any:
    torch.manual_seed(0)
    settings = config(target_modules=list(targets), lora_alpha=6, **changes)
    model = get_peft_model(Looks(), settings).to(dtype)
    perturb(model)
    return model, model.base_model.model.emb


def tokens() -> torch.Tensor:
    return torch.randint(0, 20, (3, 5), generator=torch.Generator().manual_seed(0))


def table(layer: Any, name: str = "default") -> torch.Tensor:
    """`beta E + (alpha / r) (B A)^T`, with DoRA's magnitude per column of E, or per row."""
    A, B = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    V = layer.lora_beta[name].value * layer.get_base_layer().weight + 6 / 4 * (B @ A).t()
    if name in layer.lora_magnitude:
        magnitude = layer.lora_magnitude[name].value
        per_row = magnitude.dim() == 2
        norm = V.detach().norm(dim=1 if per_row else 0, keepdim=True)
        V = magnitude.view_as(norm) / norm * V
    return V


@pytest.mark.parametrize("option", OPTIONS)
def test_equals_the_literal_equation_with_gradients(option: str) -> None:
    _, layer = made(redraw="none", **OPTIONS[option])
    x = tokens()
    x[x == 3] = 4  # what padding does is tested below
    wanted = [p for p in layer.parameters() if p.requires_grad]
    assert len(wanted) == 3 + ("use_dora" in OPTIONS[option])
    y, expected = layer(x), F.embedding(x, table(layer))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    g = torch.randn(y.shape, dtype=torch.float64)
    ours, theirs = torch.autograd.grad(y, wanted, g), torch.autograd.grad(expected, wanted, g)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_the_padding_row_is_not_trained() -> None:
    model = get_peft_model(Looks(), config(target_modules=["emb"], redraw="none"))
    layer = model.base_model.model.emb
    layer(torch.tensor([[3, 3, 4]])).sum().backward()
    gradient = layer.lora_embedding_A["default"].grad
    assert not gradient[:, 3].any() and gradient[:, 4].any()


@pytest.mark.parametrize("targets", [("emb",), ("emb", "lin")])
@pytest.mark.parametrize("redraw", REDRAW)
@pytest.mark.parametrize("option", OPTIONS)
def test_life_of_a_model(option: str, redraw: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    model, layer = made(torch.float32, targets, redraw=redraw, **OPTIONS[option])
    x = tokens()
    y, before = model(x), layer.get_base_layer().weight.clone()
    plan = model.get_plan()
    drawn = {"all": {"emb.weight", "lin.weight"}, "none": set()}
    assert set(plan.scaffold) == drawn.get(redraw, {"lin.weight"} & {f"{t}.weight" for t in targets})
    assert not any(p.requires_grad for p in layer.get_base_layer().parameters())
    model.merge_adapter()
    torch.testing.assert_close(model(x), y)
    model.unmerge_adapter()
    assert torch.equal(layer.get_base_layer().weight, before) and torch.equal(model(x), y)
    with model.disable_adapter():
        assert not torch.equal(model(x), y)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    with safe_open(file, "pt") as content:
        assert not any("emb.weight" in key or "emb.base_layer" in key for key in content.keys())  # noqa: SIM118
    assert abs(file.stat().st_size - plan.artifact_bytes()) <= 64
    torch.manual_seed(0)
    assert torch.equal(PeftModel.from_pretrained(Looks(), tmp_path, is_trainable=True)(x), y)
    merged = model.merge_and_unload()
    assert type(merged.emb) is nn.Embedding
    torch.testing.assert_close(merged(x), y)


@pytest.mark.parametrize("option", ["plain", "dora"])
def test_it_is_pefts_where_beta_is_one(option: str) -> None:
    model, layer = made(redraw="none", **OPTIONS[option])
    torch.manual_seed(0)
    theirs = get_peft_model(Looks(), LoraConfig(r=4, lora_alpha=6, target_modules=["emb"], **OPTIONS[option])).double()
    peft = theirs.base_model.model.emb
    with torch.no_grad():
        layer.lora_beta["default"].value.fill_(1)
        peft.lora_embedding_A["default"].copy_(layer.lora_embedding_A["default"])
        peft.lora_embedding_B["default"].copy_(layer.lora_embedding_B["default"])
        if option == "dora":
            peft.lora_magnitude_vector["default"].weight.copy_(layer.lora_magnitude["default"].value)
    torch.testing.assert_close(model(tokens()), theirs(tokens()))


def test_a_second_adapter_and_mixed_rows() -> None:
    model, layer = made(redraw="none", norms="frozen")
    model.eval()
    x = tokens()
    first = model(x)
    model.add_adapter("b", config(target_modules=["emb"], redraw="none", lora_alpha=6, adapter_seed=5))
    assert torch.equal(model(x), first)
    model.set_adapter("b")
    perturb(model)
    second = model(x)
    torch.testing.assert_close(second, model.base_model.model.lin(F.embedding(x, table(layer, "b"))))
    mixed = model(x, adapter_names=["default", "b", "__base__"])
    torch.testing.assert_close(mixed[:2], torch.stack([first[0], second[1]]))


@pytest.mark.parametrize("redraw", REDRAW)
@pytest.mark.parametrize("build", [llama, gpt2])
def test_a_tied_head_follows_as_with_the_option(build: Any, redraw: str, tmp_path: Path) -> None:
    """Naming the token embedding and embeddings='lora' are one thing; nothing warns, and no table is saved."""
    name = {llama: "embed_tokens", gpt2: "wte"}[build]
    projection = {llama: "q_proj", gpt2: "c_attn"}[build]
    results = []
    for options in ({"target_modules": [name, projection]}, {"target_modules": [projection], "embeddings": "lora"}):
        torch.manual_seed(0)
        model = get_peft_model(build(), config(redraw=redraw, norms="frozen", save_kept=redraw != "all", **options))
        for path, parameter in sorted(model.named_parameters()):
            if "lora_" in path:  # the same for the same path
                generator = torch.Generator().manual_seed(len(path))
                parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        results.append((model, {a.path: a.kind for a in model.get_plan().adapters}, logits(model)))
    (model, kinds, y), (_, kinds_too, y_too) = results
    assert kinds == kinds_too and kinds["lm_head"] == "tied_head"
    assert torch.equal(y, y_too)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path)), y)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), y)
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight


@pytest.mark.parametrize("option", OPTIONS)
def test_a_tied_head_multiplies_with_the_adapted_table(option: str) -> None:
    model = get_peft_model(llama(), config(target_modules=["embed_tokens"], lora_alpha=6, **OPTIONS[option]))
    perturb(model.double())
    head, layer = model.base_model.model.lm_head, model.base_model.model.model.embed_tokens
    x = torch.randn(2, 3, 32, dtype=torch.float64, requires_grad=True)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    y, expected = head(x), x @ table(layer).t()
    torch.testing.assert_close(y, expected)
    g = torch.randn(y.shape, dtype=torch.float64)
    for one, other in zip(*(torch.autograd.grad(z, wanted, g) for z in (y, expected)), strict=True):
        torch.testing.assert_close(one, other)


def test_other_tables_can_be_named_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    targets = ["word_embeddings", "position_embeddings", "query"]
    model = get_peft_model(bert(), config(target_modules=targets)).eval()
    perturb(model)
    frozen = {path for path in model.get_plan().scaffold if "embedding" in path}
    assert frozen == {f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position")}
    y = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(bert(), tmp_path)), y)


def test_a_table_that_is_read_past_its_module_is_refused() -> None:
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = DebertaModel(DebertaConfig(**sizes, num_attention_heads=2, relative_attention=True, pos_att_type=["c2p"]))
    with pytest.raises(
        ValueError, match="code of DebertaModel reads the table of 'encoder.rel_embeddings' without calling"
    ):
        make_plan(model, config(target_modules=["rel_embeddings"]))


@pytest.mark.parametrize("residency", ["packed", "streamed"])
def test_residency(residency: str) -> None:
    model = get_peft_model(llama(), config(target_modules=["embed_tokens", "q_proj"], use_dora=True))
    perturb(model)
    y = logits(model)
    model.set_residency(residency)
    assert torch.equal(logits(model), y)


def test_ids_are_all_it_is_asked_for() -> None:
    model = get_peft_model(gpt2(), config(target_modules=["wpe"], redraw="none"))
    perturb(model)
    model(input_ids=ids(), labels=ids()).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "wpe.lora_" in n)
