"""Dtypes through saving and loading: what was saved comes back as it was, whichever way it is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import config, llama, logits, perturb, t5

from hf_lottalora import AutoLottaLoraModelForCausalLM, AutoLottaLoraModelForSeq2SeqLM
from hf_lottalora.artifact.auto import _check_other_dtypes
from hf_lottalora.tuner import base_model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back_in_its_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    model = get_peft_model(llama().to(dtype), config(), autocast_adapter_dtype=False).eval()
    perturb(model)
    model.save_pretrained(tmp_path)
    again = AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path)
    assert again.base_model.model.model.norm.weight.dtype is dtype
    assert torch.equal(logits(again), logits(model))


def test_mixed_precision_comes_back_as_it_was(tmp_path: Path) -> None:
    base = t5().half()
    for block in base.encoder.block:
        block.layer[1].DenseReluDense.wo.float()
    model = get_peft_model(base, config(), autocast_adapter_dtype=False)
    model.save_pretrained(tmp_path)
    again = AutoLottaLoraModelForSeq2SeqLM.from_pretrained(tmp_path, autocast_adapter_dtype=False).state_dict()
    for name, value in model.state_dict().items():
        assert again[name].dtype is value.dtype and torch.equal(again[name], value), name


@pytest.mark.parametrize(
    ("wanted", "found"), [("auto", torch.float32), ("float16", torch.float16), (torch.float64, torch.float64)]
)
def test_dtypes_are_named_as_in_transformers(saved: tuple[PeftModel, Path], wanted: Any, found: torch.dtype) -> None:
    assert AutoLottaLoraModelForCausalLM.from_pretrained(saved[1], dtype=wanted).dtype is found


@pytest.mark.parametrize("wanted", ["half precision", "int8", torch.int8, 16])
def test_what_is_no_dtype(saved: tuple[PeftModel, Path], wanted: Any) -> None:
    with pytest.raises(ValueError, match="dtype must be a floating-point dtype of torch, its name, or 'auto', got"):
        AutoLottaLoraModelForCausalLM.from_pretrained(saved[1], dtype=wanted)


@pytest.mark.parametrize("embeddings", ["train", "lora"])
def test_a_model_in_bfloat16_loses_nothing(embeddings: str, tmp_path: Path) -> None:
    """Its adapters are float32; no way of loading may round them to the model's dtype."""

    def half() -> torch.nn.Module:
        return llama().to(torch.bfloat16)

    model = get_peft_model(half(), config(task_type="CAUSAL_LM", embeddings=embeddings))
    perturb(model)
    model.save_pretrained(tmp_path)
    for again in (
        AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path),
        PeftModel.from_pretrained(half(), tmp_path),
        PeftModel.from_pretrained(half(), tmp_path, low_cpu_mem_usage=True),
    ):
        found = dict(again.named_parameters())
        for name, value in model.named_parameters():
            assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
            assert not found[name].requires_grad, name
        assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("options", [{}, {"use_dora": True, "layer_norm": True}, {"embeddings": "lora"}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("autocast", [True, False])
def test_every_way_of_loading_gives_the_same_dtypes(
    options: dict[str, Any], dtype: torch.dtype, autocast: bool, tmp_path: Path
) -> None:
    get_peft_model(llama(), config(task_type="CAUSAL_LM", **options)).save_pretrained(tmp_path)

    def signature(model: torch.nn.Module) -> dict[str, tuple[torch.dtype, bool]]:
        return {name: (parameter.dtype, parameter.requires_grad) for name, parameter in model.named_parameters()}

    def loaded(**how: Any) -> dict[str, tuple[torch.dtype, bool]]:
        return signature(PeftModel.from_pretrained(llama().to(dtype), tmp_path, autocast_adapter_dtype=autocast, **how))

    found = loaded()
    adapters = {kind for name, kind in found.items() if "lora_" in name}
    assert adapters == {(torch.float32 if autocast and dtype == torch.bfloat16 else dtype, False)}
    assert found == loaded(low_cpu_mem_usage=True)
    assert found == signature(
        AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, autocast_adapter_dtype=autocast)
    )
    trainable = loaded(is_trainable=True)
    assert {name for name, (_, wanted) in trainable.items() if wanted} >= {name for name in found if "lora_" in name}
    assert loaded(is_trainable=True, low_cpu_mem_usage=True) == trainable


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"model.norm.weight": "bfloat61"},
            r"other_dtypes\['model.norm.weight'\] must be the name of a floating dtype",
        ),
        ({"model.norm.weight": "int8"}, r"other_dtypes\['model.norm.weight'\] must be the name of a floating dtype"),
        (
            {"model.nrom.weight": "float16"},
            "other_dtypes: expected {}, .* found {'model.nrom.weight': 'float16'}",
        ),
    ],
)
def test_dtypes_that_were_edited_by_hand(
    entry: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    get_peft_model(llama(), config(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"other_dtypes": entry}))
    monkeypatch.setattr(base_model, "draw_into", None)  # nothing is drawn
    with pytest.raises(ValueError, match=message):
        AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path)


def test_dtypes_of_tensors_that_a_release_names_otherwise(tmp_path: Path) -> None:
    wanted = config(other_dtypes={"model.nrom.weight": "float16"}, format_version=1)
    with pytest.raises(ValueError, match="other_dtypes in .* names 'model.nrom.weight', which LlamaForCausalLM lacks"):
        _check_other_dtypes(tmp_path, llama(), wanted)
