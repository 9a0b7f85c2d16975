"""Rows of one batch for different adapters: each is what its adapter alone computes, or the batch is refused."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from tiny import bert, config, gpt2, ids, llama, perturb, t5, vit
from torch import nn

NAMES = ["default", "b", "__base__", "b"]


def two_adapters(base: nn.Module, second: dict[str, Any] | None = None, **options: Any) -> Any:
    """With adapters "default" and "b", each trained to something of its own, in eval mode."""
    model = get_peft_model(base, config(**options)).eval()
    perturb(model)
    model.add_adapter("b", config(**{**options, "adapter_seed": 9, **(second or {})}))
    model.set_adapter("b")
    perturb(model)
    return model


@torch.no_grad()
def each_alone(model: Any, names: list[str], **inputs: torch.Tensor) -> torch.Tensor:
    rows = []
    installed = model.active_adapters[0]
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(model(**inputs)[0][row])
        else:
            model.set_adapter(name)
            rows.append(model(**inputs)[0][row])
    model.set_adapter(installed)
    return torch.stack(rows)


def state(model: nn.Module) -> Iterator[Any]:
    """Everything that a mixed batch exchanges for its time: the parameters that stand, forwards and hooks."""
    for module in model.modules():
        yield [id(parameter) for parameter in module._parameters.values()]
        yield vars(module).get("forward"), len(module._forward_pre_hooks), len(module._forward_hooks)


def check(model: Any, names: list[str] = NAMES, **inputs: torch.Tensor) -> None:
    expected, before, rng = each_alone(model, names, **inputs), list(state(model)), torch.get_rng_state()
    with torch.no_grad():
        mixed = model(**inputs, adapter_names=names)[0]
    torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert not torch.allclose(mixed[1], mixed[3], rtol=1e-2)
    assert list(state(model)) == before and torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize(
    ("options", "second"),
    [
        ({}, {}),  # tied embeddings and norms trained
        ({"norms": "frozen"}, {"embeddings": "frozen", "norms": "train", "r": 2, "lora_alpha": 5}),
        ({"embeddings": "lora"}, {"lora_alpha": 9}),  # a tied head that follows the embedding's adapter
        ({"redraw": "none", "save_kept": True}, {"layer_norm": True, "residual": True}),
    ],
)
def test_a_causal_model(options: dict[str, Any], second: dict[str, Any]) -> None:
    model = two_adapters(llama(), second, **options)
    check(model, input_ids=ids(4))
    check(model, ["b", "default"] * 2 + ["b", "__base__", "default"], input_ids=ids(7))  # as many rows as tokens


@pytest.mark.parametrize("build", [bert, vit])
@pytest.mark.parametrize("options", [{}, {"bias": "all", "head": "train"}])
def test_what_rows_share_is_given_to_each_by_the_module_around(build: Any, options: dict[str, Any]) -> None:
    """Learned positions and class tokens: `BertEmbeddings` and `ViTEmbeddings` have the rows first."""
    model = two_adapters(build(), **options)
    inputs = {"input_ids": ids(4)} if build is bert else {"pixel_values": torch.randn(4, 1, 8, 8)}
    check(model, **inputs)


def test_a_batch_of_one_adapter_needs_no_rows() -> None:
    model = two_adapters(gpt2())
    for name in ("default", "__base__"):
        check_rows = each_alone(model, [name] * 2, input_ids=ids())
        torch.testing.assert_close(model(ids(), adapter_names=[name] * 2)[0], check_rows)


@pytest.mark.parametrize("residency", ["packed", "streamed"])
def test_half_precision_and_other_residencies(residency: Any) -> None:
    model = two_adapters(llama().to(torch.bfloat16), family="binary", residency=residency)
    expected = each_alone(model, NAMES, input_ids=ids(4))
    mixed = model(ids(4), adapter_names=NAMES)[0]
    assert mixed.dtype == expected.dtype == torch.bfloat16
    assert (mixed - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("beams", [1, 2])
def test_generate(beams: int) -> None:
    for model, options in (
        (two_adapters(llama(), task_type="CAUSAL_LM"), {"pad_token_id": 0}),
        (two_adapters(t5(), task_type="SEQ_2_SEQ_LM", embeddings="frozen"), {"decoder_start_token_id": 0}),
    ):
        options.update(max_new_tokens=4, min_new_tokens=4, do_sample=False, num_beams=beams)
        mixed = model.generate(input_ids=ids(3), adapter_names=["default", "b", "default"], **options)
        for name, rows in {"default": [0, 2], "b": [1]}.items():
            model.set_adapter(name)
            assert torch.equal(model.generate(input_ids=ids(3), **options)[rows], mixed[rows]), name
    assert not torch.equal(mixed[0], mixed[1])


class Block(nn.Module):
    """Takes and gives the rows first, and writes to a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, h: torch.Tensor, cache: Any) -> torch.Tensor:
        if cache is not None:
            cache.rows = h
        return h * self.scale


class Seen(nn.Module):
    """Reads its tensors in many ways."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embed, self.table, self.lin, self.head = (
            nn.Embedding(9, 8),
            nn.Embedding(40, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 3),
        )
        self.block = Block()

    def forward(self, x: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        h = self.embed(x)
        if self.kind == "table":  # (tokens, tokens), as relative positions are
            at = torch.arange(x.shape[1])
            h = h + self.table(at[:, None] + at).sum(1)
        if self.kind == "positions":
            h = h + self.table(positions)
        if self.kind == "time first":
            return self.head(self.lin(h.transpose(0, 1))).transpose(0, 1)
        if self.kind == "flat":
            return self.head(self.lin(h)).flatten(0, 1) + self.head(h.flatten(0, 1))
        if self.kind == "read elsewhere":
            return nn.functional.linear(self.lin(h), self.head.weight)
        return self.head(self.block(self.lin(h), SimpleNamespace() if self.kind == "cache" else None))


def seen(kind: str, **options: Any) -> Any:
    return two_adapters(Seen(kind), target_modules=["lin"], redraw="none", save_kept=True, **options)


@pytest.mark.parametrize(
    ("kind", "trained", "text"),
    [
        ("table", ["table"], "'table.weight', which adapters .* is read by 'table', and no module around it takes"),
        ("flat", ["head"], "'head.weight', which adapters .* is read by 'head', and no"),
        ("time first", ["head"], "'head.weight', which adapters .* is read by 'head', and no"),
        ("time first", ["embed"], "'lin' has an adapter, and is not called with the rows of the batch first"),
        ("read elsewhere", ["head"], "'head.weight', which adapters .* is read by 'Seen', and no"),
        ("cache", ["block"], "'block.scale', which adapters .* is read by 'block', and no"),
        ("positions", ["table"], r"whether an input of shape \(4,\) has an entry for each of 4 rows"),
    ],
)
def test_what_has_no_rows_is_refused_by_name(kind: str, trained: list[str], text: str) -> None:
    """The length of the sequence is that of the batch, so that sizes alone would let it pass."""
    model = seen(kind, modules_to_save=trained)
    x, before = torch.arange(16).view(4, 4) % 9, list(state(model))
    inputs = (x, torch.arange(4)) if kind == "positions" else (x,)
    expected = model(*inputs)
    with pytest.raises(ValueError, match=text):
        model(*inputs, adapter_names=NAMES)
    assert list(state(model)) == before and torch.equal(model(*inputs), expected)


def test_what_was_not_seen_before_is_refused_when_it_runs() -> None:
    """A module that the first rows do not reach, as an expert may be."""

    class Sometimes(Seen):
        def forward(self, x: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
            h = self.lin(self.embed(x))
            return self.head(h + self.table(x) if bool((x == 8).any()) else h)

    model = two_adapters(Sometimes(""), target_modules=["lin"], modules_to_save=["table"], redraw="none")
    x = torch.zeros(4, 5, dtype=torch.long)
    before = list(state(model))
    model(x, adapter_names=NAMES)
    x[3, 0] = 8
    with pytest.raises(ValueError, match="'table' was called otherwise than when the model was run on the first rows"):
        model(x, adapter_names=NAMES)
    assert list(state(model)) == before


def test_other_refusals() -> None:
    model = two_adapters(llama())
    with pytest.raises(ValueError, match="adapter_names has 3 names, and no input has so many rows"):
        model(ids(4), adapter_names=NAMES[:3])
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): c"):
        model(ids(4), adapter_names=["c", *NAMES[1:]])
    with pytest.raises(ValueError, match="It was run on the first 1 of 4 rows to find out, and raised TypeError"):
        seen("", modules_to_save=["head"])(ids(4) % 9, nonsense=1, adapter_names=NAMES)
    with pytest.raises(ValueError, match="when the model is in training mode"):
        model.train()(ids(4), adapter_names=NAMES)
    check(model.eval(), input_ids=ids(4))


@pytest.mark.parametrize("generating", [False, True])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_as_many_names_as_rows(generating: bool, count: int) -> None:
    """Also of one adapter alone, which needs nothing else."""
    model = two_adapters(llama())
    call = partial(model.generate, max_new_tokens=2) if generating else model
    for names in (["b"] * count, ["__base__"] * count):
        with pytest.raises(ValueError, match=rf"adapter_names has {count} names, and no input has so many rows"):
            call(input_ids=ids(4), adapter_names=names)
    check(model, input_ids=ids(4))


@pytest.mark.parametrize("names", [[], "b", ["b", None, "b", "b"], [1, 2, 3, 4]])
def test_names_that_are_none(names: Any) -> None:
    model = two_adapters(llama())
    with pytest.raises(ValueError, match="adapter_names must be a list with the name of an adapter for each row"):
        model(ids(4), adapter_names=names)
    check(model, input_ids=ids(4))


@pytest.mark.parametrize("before", [False, True])
def test_under_autocast(before: bool) -> None:
    """Whose cache keeps what it has cast, so that a tensor is read once for several calls."""
    model = two_adapters(llama(tie_word_embeddings=False))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        if before:
            model(ids(4))
        mixed = model(ids(4), adapter_names=NAMES).logits
        torch.testing.assert_close(mixed, each_alone(model, NAMES, input_ids=ids(4)), rtol=0.05, atol=0.1)
    check(model, input_ids=ids(4))


@pytest.mark.parametrize("kind", ["static", "offloaded"])
def test_caches_without_rows_are_refused(kind: str) -> None:
    model = two_adapters(llama())
    before = list(state(model))
    with pytest.raises(ValueError, match="needs to know where the rows of a batch are"):
        model.generate(ids(4), adapter_names=NAMES, max_new_tokens=2, cache_implementation=kind)
    assert list(state(model)) == before
