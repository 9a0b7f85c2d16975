"""Arguments that users of transformers and PEFT know: they mean the same here, or are answered."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import llama, logits
from transformers import BitsAndBytesConfig, PreTrainedModel

from hf_lottalora import AutoLottaLoraModelForCausalLM

load = AutoLottaLoraModelForCausalLM.from_pretrained


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"torch_dtype": "bfloat16"}, torch.bfloat16),
        ({"torch_dtype": torch.float64}, torch.float64),
        ({"torch_dtype": "auto"}, torch.float32),
        ({"torch_dtype": torch.float16, "dtype": torch.float16}, torch.float16),
    ],
)
def test_torch_dtype_is_dtype(saved: tuple[PeftModel, Path], given: dict[str, Any], found: torch.dtype) -> None:
    assert load(saved[1], **given).dtype is found


@pytest.mark.parametrize("given", ["cpu", torch.device("cpu"), {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}, "auto"])
def test_a_device_map_of_one_device(saved: tuple[PeftModel, Path], given: Any) -> None:
    again = load(saved[1], device_map=given)
    wanted = torch.accelerator.current_accelerator() if given == "auto" and torch.accelerator.is_available() else "cpu"
    assert {parameter.device.type for parameter in again.parameters()} == {torch.device(wanted).type}
    assert torch.equal(logits(again.cpu()), logits(saved[0]))


def test_a_device_map_is_the_device(saved: tuple[PeftModel, Path]) -> None:
    assert {p.device.type for p in load(saved[1], device_map={"": "meta"}).parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"device_map": "balanced"}, ValueError, r"'balanced' is not one device, but .* residency='packed'.* device='cuda'"),
        ({"device_map": {"model": "cpu", "lm_head": "meta"}}, ValueError, "is not one device, but the model goes to one"),
        ({"device_map": "cpu", "device": "meta"}, ValueError, "Pass device or device_map, not both"),
        ({"device_map": "no such"}, RuntimeError, "no such"),
        ({"dtype": "float16", "torch_dtype": "float32"}, ValueError, "torch_dtype is another name of dtype, got"),
        ({"torch_dtype": "int8"}, ValueError, "dtype must be a floating-point dtype of torch"),
        ({"quantization_config": BitsAndBytesConfig()}, TypeError, r"\['quantization_config'\]. .* drawn, not stored.* residency='packed'"),
        ({"load_in_4bit": True, "max_memory": {}}, TypeError, "of load_in_4bit: .*Instead of max_memory: the model goes to one device"),
        ({"trust_remote_code": True}, TypeError, r"no code from a repository is run; .* PeftModel.from_pretrained\(model, path\)"),
        ({"seed": 3}, TypeError, r"does not take \['seed'\]. The architecture and the adapter's options come from the artifact"),
    ],
)  # fmt: skip
def test_what_is_answered(
    saved: tuple[PeftModel, Path], given: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        load(saved[1], **given)


def test_pefts_other_methods_save_as_ever(tmp_path: Path) -> None:
    get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path, push_to_hub=True)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert PeftModel.save_pretrained.__doc__ and PeftModel.save_pretrained.__name__ == "save_pretrained"
    assert "selected_adapters" in inspect.signature(PeftModel.save_pretrained).parameters
    assert "push_to_hub" in inspect.signature(PreTrainedModel.save_pretrained).parameters  # where users know it from
