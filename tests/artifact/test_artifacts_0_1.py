"""What version 0.1 wrote comes back to the bit: the targets that its table meant, and every tensor."""

from __future__ import annotations

import json

import artifacts_0_1
import pytest
import torch
import transformers
from artifacts_0_1 import FOLDER
from peft import PeftModel

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


def test_a_difference_would_be_seen() -> None:
    expected = json.loads((FOLDER / "llama" / "expected.json").read_text())["tensors"]
    model = PeftModel.from_pretrained(artifacts_0_1.base("llama"), FOLDER / "llama")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_beta"
    model.get_submodule(key.removesuffix(".lora_beta")).lora_beta["default"].data += 1e-6
    found = artifacts_0_1.fingerprint(model)
    assert [name for name in expected if expected[name] != found[name]] == [key]
