"""`repr` of an adapted layer: one line that says what it is."""

from __future__ import annotations

from typing import Any

import pytest
from peft import PeftModel, get_peft_model
from tiny import config, llama
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

ADAPTER = "r=4, alpha/r=2, beta trained"
LINES: list[tuple[nn.Module, dict[str, Any], str]] = [
    (nn.Linear(8, 6), {}, f"Linear(8 -> 6, bias, seed=42, normal, {ADAPTER}, dense)"),
    (nn.Linear(8, 6, bias=False), {"residency": "packed"}, f"Linear(8 -> 6, seed=42, normal, {ADAPTER}, packed)"),
    (
        nn.Linear(8, 6),
        {"redraw": "none", "train_beta": False},
        "Linear(8 -> 6, bias, kept, r=4, alpha/r=2, beta fixed, ",
    ),
    (
        nn.Linear(8, 8),
        {"use_dora": True, "residual": True, "layer_norm": True},
        "trained, DoRA, residual, layer_norm, ",
    ),
    (
        nn.Linear(8, 6),
        {"use_dora": True, "dora_magnitude": "inputs", "residual": True},
        "trained, DoRA by input, dense)",
    ),
    (nn.Linear(8, 6), {"use_rslora": True, "lora_dropout": 0.1}, "r=4, alpha/sqrt(r)=4, beta trained, dropout=0.1, "),
    (Conv1D(6, 8), {"family": "binary", "residency": "int4"}, f"Conv1D(8 -> 6, bias, seed=42, binary, {ADAPTER}, "),
    (
        nn.Conv1d(4, 8, 1),
        {"residency": "streamed"},
        f"Conv1d(4 -> 8, kernel_size=1, bias, seed=42, normal, {ADAPTER}, str",
    ),
    (
        nn.Conv2d(8, 8, 3, stride=(2, 1), padding=1, groups=2),
        {},
        "Conv2d(8 -> 8, kernel_size=3, stride=(2, 1), padding=1, groups=2, bias, seed=42, ",
    ),
    (FalconLinear(8, 6), {}, "FalconLinear(8 -> 6, bias, own forward, seed=42, "),
]


def adapted(layer: nn.Module, **options: Any) -> PeftModel:
    return get_peft_model(nn.Sequential(layer), config(target_modules=["0"], **options))


@pytest.mark.parametrize(("layer", "options", "expected"), LINES, ids=[line[2] for line in LINES])
def test_one_line(layer: nn.Module, options: dict[str, Any], expected: str) -> None:
    text = repr(adapted(layer, **options).base_model.model[0])
    assert text.startswith("lottalora.") and expected in text and "\n" not in text


def test_embedding_and_tied_head() -> None:
    model = get_peft_model(llama(), config(embeddings="lora")).base_model.model
    assert repr(model.model.embed_tokens) == f"lottalora.Embedding(99 -> 32, seed=42, normal, {ADAPTER}, dense)"
    assert repr(model.lm_head) == "lottalora.TiedHead(32 -> 99, the adapter of the input embedding)"


def test_several_adapters_and_what_is_on() -> None:
    model = adapted(nn.Linear(8, 6))
    model.add_adapter("other", config(r=2, target_modules=["0"], train_beta=False))
    layer = model.base_model.model[0]
    assert f"normal, default({ADAPTER}), other(r=2, alpha/r=4, beta fixed), dense)" in repr(layer)
    model.merge_adapter()
    assert repr(layer).endswith("dense, merged ['default'])")
    model.unmerge_adapter()
    with model.disable_adapter():
        assert repr(layer).endswith("dense, disabled)")
    with model.scaffold_seed(43):
        assert "seed=43" in repr(layer)
