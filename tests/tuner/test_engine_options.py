"""Which engines of Accelerate, and which of their options, are refused for a model over a scaffold."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from peft import get_peft_model
from tiny import config, llama

from hf_lottalora.tuner import engines

FSDP2 = {
    "fsdp_version": 2,
    "cpu_ram_efficient_loading": False,
    "ignored_modules": None,
    "mixed_precision_policy": None,
}
BF16 = SimpleNamespace(param_dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("kind", "plugin", "options", "message"),
    [
        ("DEEPSPEED", {}, {}, r"DEEPSPEED is not supported over a scaffold. Use DDP or FSDP2"),
        ("MEGATRON_LM", {}, {}, "MEGATRON_LM is not supported"),
        ("FSDP", {"fsdp_version": 1}, {}, "FSDP1 flattens weights.*fsdp_version: 2"),
        ("FSDP", {"cpu_ram_efficient_loading": True}, {}, "fsdp_cpu_ram_efficient_loading: false in accelerate's"),
        ("FSDP", {}, {"device_map": True}, "A model with a device_map cannot be sharded"),
        ("FSDP", {"ignored_modules": ".*mlp"}, {"residency": "packed"}, "ignored_modules='.*mlp' with residency"),
        (
            "FSDP",
            {"mixed_precision_policy": BF16},
            {"residency": "packed"},
            "computes in torch.bfloat16.*torch.float32",
        ),
        ("FSDP", {}, {"version": "1.14"}, "FSDP2 over a scaffold needs accelerate >= 1.15"),
    ],
)
def test_what_is_refused(
    kind: str, plugin: dict[str, Any], options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = options.get("version") is not None
    monkeypatch.setattr(engines, "compare_versions", lambda *_: old)
    base = llama()
    model = get_peft_model(base, config(**{key: options[key] for key in ("residency",) if key in options}))
    if "device_map" in options:
        base.hf_device_map = {"": "cpu"}
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(**{**FSDP2, **plugin}))
    accelerator = SimpleNamespace(distributed_type=DistributedType[kind], state=state)
    with pytest.raises(ValueError, match=message):
        engines.check_engine(accelerator, model)


@pytest.mark.parametrize("kind", ["NO", "MULTI_CPU", "MULTI_GPU", "FSDP"])
def test_what_is_not(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "compare_versions", lambda *_: False)
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(**FSDP2))
    accelerator = SimpleNamespace(distributed_type=DistributedType[kind], state=state)
    engines.check_engine(accelerator, get_peft_model(llama(), config()))
