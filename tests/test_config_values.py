"""Whatever a field is given: it works, or the error names the field, is ours, and the model is as it was."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.tuners.lora.config import LoraRuntimeConfig
from tiny import config, llama, mlp
from torch import nn

import hf_lottalora
from hf_lottalora import LottaLoraConfig

VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 2**70, 10**9, 10**400, 0.5, -0.5, float("nan"), float("inf"), 1e-320, 1j, Decimal(1),
    "", "x", "(", "0", "all", "train", "CAUSAL_LM", "float32", b"x", [], [3], [-1], ["x"], ["0", None], ["("], (), (1,),
    {1}, {"x"}, {}, {"x": 1}, {3: "x"}, {"(": 1}, {"0": object()}, {"0": True}, {"0": "x"}, {"0": 10**9}, {"0": [1]},
    range(3), object(), Ellipsis, int, lambda: 3, torch.ones(2), torch.tensor(3), np.ones(2), np.float32(1), np.int64(2),
    [torch.ones(2)], nn.Linear(2, 2), LoraRuntimeConfig(ephemeral_gpu_offload="yes"), Path("x"), LoraConfig,
]  # fmt: skip
# Where one option is refused because of what another says, the error names the other one.
OTHERS = {
    "scaffold_digests": "The artifact was made over another backbone",
    "layers_pattern": "layers_to_transform",
    "dora_magnitude": "use_dora",
}
MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "mlp": lambda: (mlp(), {"target_modules": ["0", "2"], "modules_to_save": ["4"]}),
    "llama": lambda: (llama(), {}),
}
READ_BY_PEFT_FIRST = {"task_type", "peft_type", "base_model_name_or_path", "init_lora_weights"}
NAMES = {"base_model_name_or_path", "lottalora_version", "megatron_core", "peft_version", "revision"}  # any string
FIELDS = [field.name for field in dataclasses.fields(LottaLoraConfig)]


def check_error(error: Exception, name: str) -> None:
    assert type(error) in (TypeError, ValueError), repr(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    ours = Path(hf_lottalora.__file__).parent in Path(frame.filename).parents
    assert ours or frame.filename.endswith("peft/tuners/lora/config.py"), (frame, error)
    assert name in str(error) or (name in OTHERS and OTHERS[name] in str(error)), str(error)
    assert "got" in str(error) or len(str(error)) > 60, str(error)


def attempt(make: Callable[[], LottaLoraConfig], model: nn.Module, name: str) -> bool:
    """Whether it worked. If not, the model is untouched."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    layers, classes = dict(model.named_modules()), [type(module) for module in model.modules()]
    state = torch.get_rng_state()
    try:
        get_peft_model(model, make())
    except Exception as error:
        check_error(error, name)
        after = model.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
        assert layers == dict(model.named_modules()) and classes == [type(module) for module in model.modules()]
        assert torch.equal(state, torch.get_rng_state())
        return False
    return True


@pytest.mark.parametrize(
    ("build", "name"), [(build, name) for build in MODELS for name in FIELDS if build == "mlp" or name not in NAMES]
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:The following .* keys did not match:RuntimeWarning")
def test_any_value_of_any_field(build: str, name: str) -> None:
    model, options = MODELS[build]()
    for value in VALUES:
        if attempt(lambda v=value: config(**{**options, name: v}), model, name):  # type: ignore[misc]
            model, _ = MODELS[build]()


@pytest.mark.parametrize("name", sorted(set(FIELDS) - READ_BY_PEFT_FIRST))
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:The following .* keys did not match:RuntimeWarning")
def test_any_value_that_a_field_is_given_later(name: str) -> None:
    model, options = MODELS["mlp"]()
    for value in VALUES:
        made = config(**options)
        setattr(made, name, value)
        if attempt(lambda made=made: made, model, name):  # type: ignore[misc]
            model, _ = MODELS["mlp"]()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 2.0}, r"r must be a positive integer, got 2.0 \(float\)"),
        ({"r": True}, r"r must be a positive integer, got True \(bool\)"),
        ({"target_modules": ["0", None]}, r"target_modules\[1\] must be a module name, got None\."),
        ({"rank_pattern": {"0": 2, "2": "3"}}, r"rank_pattern\['2'\] must be a positive integer, got '3' \(str\)"),
        ({"alpha_pattern": {3: 1.0}}, r"alpha_pattern's key 3 must be a string, got 3 \(int\)"),
        ({"seed_pattern": [3]}, r"seed_pattern must be a dict from strings to integers, got \[3\] \(list\)"),
        ({"lora_alpha": 10**400}, r"lora_alpha must be a positive number"),
        ({"layers_to_transform": "3"}, r"layers_to_transform must be a list of integers, an integer or None, got '3'"),
        ({"exclude_modules": ".*"}, r"with exclude_modules='\.\*' matches no linear layer"),
        ({"runtime_config": None}, r"runtime_config must be a LoraRuntimeConfig, got None\."),
        (
            {"runtime_config": LoraRuntimeConfig(ephemeral_gpu_offload=1)},
            r"runtime_config.ephemeral_gpu_offload must be True or False, got 1 \(int\)",
        ),
        ({"task_type": "x"}, r"task_type must be one of \['SEQ_CLS', .*\] or None, got 'x' \(str\)"),
        ({"task_type": "CAUSAL_LM"}, r"task_type='CAUSAL_LM' is for models that generate, and Sequential has no"),
        ({"peft_type": "LORA"}, r"peft_type must be one of \['LOTTALORA'\] or None, got 'LORA'"),
        ({"other_dtypes": {"a": "x"}}, r"other_dtypes\['a'\] must be the name of a floating dtype of torch, got 'x'"),
        ({"r": 10**9}, r"r: rank 1000000000 over '0' would make a tensor of 16,000,000,000 elements, .* above 12 adds"),
        ({"rank_pattern": {"2": 10**9}}, r"rank_pattern: rank 1000000000 over '2' would make a tensor of"),
    ],
)
def test_what_errors_say(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_peft_model(mlp(), config(**{"target_modules": ["0", "2"], **changes}))
    with pytest.raises(ValueError, match="target_modules=.* with layers_to_transform=99, with .*='layers' matches no"):
        get_peft_model(llama(), config(layers_to_transform=99, layers_pattern="layers"))


def test_sets_and_tuples_are_lists(tmp_path: Path) -> None:
    options: dict[str, Any] = {"target_modules": ("q_proj",), "modules_to_save": ("lm_head",), "exclude_modules": {"x"}}
    made = config(**options, layers_to_transform={1, 0}, layers_pattern=("layers",), lora_alpha=2.5)
    made.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(again, LottaLoraConfig)
    for name in (*options, "layers_to_transform", "layers_pattern", "lora_alpha"):
        assert getattr(again, name) == getattr(made, name)
    assert again.layers_to_transform == [0, 1] and again.modules_to_save == ["lm_head"]
    # PEFT's task class appends to modules_to_save, which only a list allows.
    get_peft_model(mlp(), config(target_modules=("0",), modules_to_save=("4",), task_type="SEQ_CLS"))
