"""Which engines of Accelerate, and which of their options, are refused for a model over a scaffold."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
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


def accelerator_of(kind: str, options: dict[str, Any]) -> Any:
    """Like Accelerate's, with these options of the engine."""
    state = SimpleNamespace(
        fsdp_plugin=SimpleNamespace(**{**FSDP2, **options}), deepspeed_plugin=SimpleNamespace(deepspeed_config=options)
    )
    parallelism = SimpleNamespace(tp_size=options.get("tp_size", 1))
    return SimpleNamespace(distributed_type=DistributedType[kind], state=state, parallelism_config=parallelism)


@pytest.mark.parametrize(
    ("kind", "plugin", "options", "message"),
    [
        ("MEGATRON_LM", {}, {}, "MEGATRON_LM is not supported over a scaffold. Use DDP, FSDP2 or DeepSpeed"),
        ("DEEPSPEED", {"tensor_parallel": {"autotp_size": 2}}, {}, "DeepSpeed's tensor_parallel.autotp_size is not"),
        ("DEEPSPEED", {"zero_optimization": {"offload_param": {"device": "nvme"}}}, {}, "offload_param.device: nvme"),
        ("MULTI_GPU", {"tp_size": 2}, {}, r"ParallelismConfig\(tp_size=...\) is not supported"),
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
    accelerator = accelerator_of(kind, plugin)
    with pytest.raises(ValueError, match=message):
        engines.check_engine(accelerator, model)


@pytest.mark.parametrize("kind", ["NO", "MULTI_CPU", "MULTI_GPU", "FSDP", "DEEPSPEED"])
def test_what_is_not(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "compare_versions", lambda *_: False)
    engines.check_engine(accelerator_of(kind, {}), get_peft_model(llama(), config()))


CONFIGS = {path.stem: path for path in (Path(__file__).parents[2] / "examples" / "configs").glob("*.yaml")}


def test_there_is_a_configuration_file_for_each_engine() -> None:
    assert sorted(CONFIGS) == ["ddp", "fsdp2", "fsdp2_packed", "zero2", "zero3"]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_configuration_files_are_accelerates(name: str) -> None:
    found: Any = load_config_from_file(str(CONFIGS[name]))  # which refuses what it does not know
    engine = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}[name.split("_")[0]]
    assert found.distributed_type == engine
    if engine == "FSDP":
        assert (found.fsdp_config["fsdp_version"], found.fsdp_config["fsdp_cpu_ram_efficient_loading"]) == (2, False)
    if engine == "DEEPSPEED":
        assert found.deepspeed_config["zero_stage"] == int(name[-1])
