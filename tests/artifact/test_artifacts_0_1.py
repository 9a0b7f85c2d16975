"""What version 0.1 wrote comes back to the bit: the targets that its table meant, and every tensor."""

from __future__ import annotations

import json
from typing import Any

import artifacts_0_1
import pytest
import torch
import transformers
from artifacts_0_1 import FOLDER
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)

from hf_lottalora import LottaLoraConfig

# transformers has renamed tensors of these since 5.0, and with its name a scaffold's stream changes.
RENAMED = {"vit", "gpt_neox"}
NOT_HERE = RENAMED if transformers.__version__.startswith("5.0.") else {f"{name}@5.0" for name in RENAMED}
NAMES = sorted(folder.name for folder in FOLDER.iterdir())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_comes_back_to_the_bit(name: str) -> None:
    expected = json.loads((FOLDER / name / "expected.json").read_text())
    if name in NOT_HERE:
        with pytest.raises(
            ValueError,
            match="was made over another backbone: .*is in|The artifact (lacks|has the foreign key) 'base_model|over another architecture",
        ):
            PeftModel.from_pretrained(artifacts_0_1.base(name), FOLDER / name)
        return
    model = PeftModel.from_pretrained(artifacts_0_1.base(name), FOLDER / name).eval()
    assert artifacts_0_1.fingerprint(model) == expected["tensors"]
    with torch.no_grad():
        output = model(**artifacts_0_1.batch(name)).logits.double().flatten()[:32]
    torch.testing.assert_close(output, torch.tensor(expected["output"], dtype=torch.float64), atol=1e-5, rtol=1e-4)


def _existing(name: str, peft: PeftModel, **options: Any) -> PeftModel:
    peft.load_adapter(FOLDER / name, "default", **options)  # as Trainer resumes
    return peft


def _second(name: str, peft: PeftModel) -> PeftModel:
    peft.load_adapter(FOLDER / name, "other")
    peft.set_adapter("other")
    peft.delete_adapter("default")
    return peft


def _state_dict(name: str, peft: PeftModel, **options: Any) -> PeftModel:
    set_peft_model_state_dict(peft, load_peft_weights(str(FOLDER / name)), **options)
    return peft


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("decay_beta", [False, True])
@pytest.mark.parametrize("name", ["llama-dora", "llama-layer-norm-residual", "llama-tied-lora", "bert-frozen-beta"])
def test_every_way_of_loading(name: str, decay_beta: bool) -> None:
    expected = json.loads((FOLDER / name / "expected.json").read_text())["tensors"]

    def peft() -> PeftModel:
        settings = {"seed": 42, "r": 2, **artifacts_0_1.CASES[name].options}
        return get_peft_model(artifacts_0_1.base(name), LottaLoraConfig(**settings, decay_beta=decay_beta))

    assert artifacts_0_1.fingerprint(peft()) != expected
    ways = {
        "existing": _existing(name, peft()),
        "existing, to train": _existing(name, peft(), is_trainable=True),
        "existing, low memory": _existing(name, peft(), low_cpu_mem_usage=True),
        "state dict": _state_dict(name, peft()),
        "state dict, low memory": _state_dict(name, peft(), low_cpu_mem_usage=True),
        "new, low memory": PeftModel.from_pretrained(
            artifacts_0_1.base(name), FOLDER / name, low_cpu_mem_usage=True, is_trainable=True
        ),
    }
    for way, model in ways.items():
        assert artifacts_0_1.fingerprint(model) == expected, way
    second = _second(name, peft())
    found = get_peft_model_state_dict(second, adapter_name="other")
    alone = get_peft_model_state_dict(ways["existing"])
    assert found.pop("lottalora_manifest") is not alone.pop("lottalora_manifest")  # each has its own options
    assert found.keys() == alone.keys() and all(torch.equal(found[key], alone[key]) for key in found)


@pytest.mark.filterwarnings("ignore:.*was written by version 0.1")
def test_a_difference_would_be_seen() -> None:
    expected = json.loads((FOLDER / "llama" / "expected.json").read_text())["tensors"]
    model = PeftModel.from_pretrained(artifacts_0_1.base("llama"), FOLDER / "llama")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_beta"
    model.get_submodule(key.removesuffix(".lora_beta")).lora_beta["default"].value.data += 1e-6
    found = artifacts_0_1.fingerprint(model)
    assert [name for name in expected if expected[name] != found[name]] == [key]


def test_it_is_said_once_what_they_cannot_prove() -> None:
    with pytest.warns(UserWarning, match="was written by version 0.1: only the scaffold is sure .* save it again"):
        PeftModel.from_pretrained(artifacts_0_1.base("llama"), FOLDER / "llama")
