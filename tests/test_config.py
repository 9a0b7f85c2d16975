from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from peft import LoraConfig, PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType
from tiny import config

from hf_lottalora import LottaLoraConfig, LottaLoraModel
from hf_lottalora._registry import register


def test_it_is_a_true_member_of_pefts_enum() -> None:
    member = PeftType("LOTTALORA")
    assert member is PeftType.LOTTALORA and member in list(PeftType) and member == "LOTTALORA"
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is LottaLoraConfig
    assert config().peft_type is member


def test_registering_again_is_harmless_and_a_taken_name_is_loud(monkeypatch: pytest.MonkeyPatch) -> None:
    register()
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType("LOTTALORA"), LoraConfig)
    with pytest.raises(RuntimeError, match="already registered by peft"):
        register()


def test_paper_defaults() -> None:
    assert dataclasses.asdict(config()).items() >= {
        "family": "normal", "scale": "fan_in", "redraw": "all", "embeddings": "train", "head": None, "norms": "train",
        "biases": "frozen", "train_beta": True, "adapter_seed": None, "target_modules": None, "lora_dropout": 0.0,
    }.items()  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"seed": None}, TypeError, "needs a seed"),
        ({"seed": -1}, ValueError, "seed must satisfy 0 <= seed"),
        ({"seed": 1 << 64}, ValueError, "seed must satisfy 0 <= seed"),
        ({"seed": 1.5}, TypeError, "seed must be an integer, got 1.5"),
        ({"adapter_seed": -1}, ValueError, "adapter_seed must satisfy"),
        ({"family": "gauss"}, ValueError, "family must be one of"),
        ({"scale": 0}, ValueError, "scale must be None, 'fan_in', .* or a positive number for family 'normal', got 0"),
        ({"scale": float("nan")}, ValueError, "got nan"),
        ({"scale": "kaimin"}, ValueError, "got 'kaimin'"),
        ({"r": 0}, ValueError, "r must be a positive integer, got 0"),
        ({"r": -3}, ValueError, "r must be a positive integer, got -3"),
        ({"r": 2.0}, ValueError, "r must be a positive integer, got 2.0"),
        ({"rank_pattern": {"q_proj": 0}}, ValueError, r"rank_pattern\['q_proj'\] must be a positive integer"),
        ({"rank_pattern": [2]}, ValueError, r"rank_pattern must be a dict .*, got \[2\]"),
        ({"alpha_pattern": {"q_proj": -4.0}}, ValueError, r"alpha_pattern\['q_proj'\] must be a positive number"),
        ({"alpha_pattern": {"q_proj": "x"}}, ValueError, r"alpha_pattern\['q_proj'\] must be a positive number"),
        ({"family_pattern": None}, ValueError, "family_pattern must be a dict .*, got None"),
        ({"family_pattern": {"(": "binary"}}, ValueError, r"family_pattern: '\(' is no regular expression: missing \)"),
        ({"target_modules": "("}, ValueError, r"target_modules: '\(' is no regular expression"),
        ({"target_modules": 3}, ValueError, "target_modules must be a list of module names, a regular expression or None, got 3"),
        ({"exclude_modules": [3]}, ValueError, r"exclude_modules\[0\] must be a module name, got 3 \(int\)"),
        ({"lora_dropout": "0.1"}, ValueError, r"lora_dropout must be a number in \[0, 1\), got '0.1'"),
        ({"lora_dropout": None}, ValueError, r"lora_dropout must be a number in \[0, 1\), got None"),
        ({"lora_alpha": float("nan")}, ValueError, "lora_alpha must be a positive number, got nan"),
        ({"lora_alpha": float("inf")}, ValueError, "lora_alpha must be a positive number, got inf"),
        ({"use_dora": "yes"}, ValueError, "use_dora must be True or False, got 'yes'"),
        ({"use_rslora": "no"}, ValueError, "use_rslora must be True or False, got 'no'"),
        ({"lora_dropout": 1.0}, ValueError, r"lora_dropout must be a number in \[0, 1\), got 1.0"),
        ({"redraw": "some"}, ValueError, "redraw must be one of"),
        ({"embeddings": "drawn"}, ValueError, "embeddings must be one of"),
        ({"head": "frozen"}, ValueError, "head must be one of"),
        ({"norms": "lora"}, ValueError, "norms must be one of"),
        ({"train_beta": "no"}, ValueError, "train_beta must be True or False, got 'no'"),
        ({"lora_alpha": 0}, ValueError, "lora_alpha must be a positive number, got 0"),
        ({"biases": "all"}, ValueError, "biases must be one of"),
        ({"init_lora_weights": "pissa"}, ValueError, "init_lora_weights='pissa' makes no sense"),
        ({"init_lora_weights": "olora"}, ValueError, "init_lora_weights='olora' makes no sense"),
        ({"init_lora_weights": "eva"}, ValueError, "init_lora_weights='eva' makes no sense"),
        ({"init_lora_weights": "corda"}, ValueError, "init_lora_weights='corda' makes no sense"),
        ({"init_lora_weights": "gaussian"}, ValueError, "init_lora_weights='gaussian' makes no sense"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, ValueError, "makes no sense"),
        ({"dora_magnitude": "rows", "use_dora": True}, ValueError, "dora_magnitude must be one of"),
        ({"dora_magnitude": "inputs"}, ValueError, "dora_magnitude='inputs' needs use_dora=True"),
        ({"layer_norm": True, "embeddings": "lora"}, ValueError, "layer_norm is for layers that multiply"),
        ({"residual": 1}, ValueError, "residual must be True or False, got 1"),
        ({"bias": "some"}, ValueError, "bias must be one of"),
        ({"bias": "all", "biases": "train"}, ValueError, "bias='all' and biases='train' both say which biases"),
        ({"lora_bias": 1}, ValueError, "lora_bias must be True or False, got 1"),
        ({"lora_bias": True, "use_dora": True}, ValueError, "lora_bias=True is not supported for DoRA"),
        ({"layer_replication": [(0, 2)]}, ValueError, "does not take layer_replication"),
        ({"target_parameters": ["a.weight"]}, ValueError, "does not take target_parameters"),
        ({"trainable_token_indices": [-1]}, ValueError, "must be a list of distinct token ids, .* got"),
        ({"trainable_token_indices": {"wte": [1, 1]}}, ValueError, "must be a list of distinct token ids, .* got"),
        ({"ensure_weight_tying": True}, ValueError, "does not take ensure_weight_tying"),
        ({"generator": "mt19937"}, ValueError, "generator 'mt19937' is not known"),
        ({"format_version": 2}, ValueError, "Scaffold format 2 .* Upgrade with"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's own, about options that are refused right after
def test_bad_values_are_refused_by_name(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        config(**changes)


def test_every_lora_option_is_taken_or_refused() -> None:
    """A new PEFT option must be looked at before it passes: this list is what the layer really honours."""
    from hf_lottalora.options import REFUSED

    honoured = {
        "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "inference_mode",
        "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_bias", "lora_dropout", "megatron_core",
        "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
        "runtime_config", "target_modules", "task_type", "trainable_token_indices", "use_dora", "use_rslora",
    }  # fmt: skip
    assert {field.name for field in dataclasses.fields(LoraConfig)} - honoured - set(REFUSED) == set()


def test_round_trip_through_json(tmp_path: Any) -> None:
    original = config(target_modules=["b", "a"], seed=2**64 - 1, scale=0.5, adapter_seed=3)
    original.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["seed"] == 2**64 - 1 and written["target_modules"] == ["a", "b"] and written["format_version"] == 1
    again = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(again, LottaLoraConfig)
    for name in ("seed", "adapter_seed", "scale", "target_modules", "family", "r"):
        assert getattr(again, name) == getattr(original, name)


@pytest.mark.parametrize("key", ["seed", "format_version"])
def test_a_file_without_seed_or_format_is_refused(tmp_path: Any, key: str) -> None:
    config().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    content = json.loads(file.read_text())
    del content[key]
    file.write_text(json.dumps(content))
    with pytest.raises((ValueError, TypeError), match=f"adapter_config.json has no '{key}'"):
        PeftConfig.from_pretrained(tmp_path)


def test_help_is_there_for_every_field() -> None:
    own = {field.name for field in dataclasses.fields(LottaLoraConfig)} - {
        f.name for f in dataclasses.fields(LoraConfig)
    }
    fields = {field.name: field for field in dataclasses.fields(LottaLoraConfig)}
    assert all(len(fields[name].metadata["help"]) > 20 for name in own)
    assert LottaLoraModel.prefix == "lora_"


def test_every_field_of_ours_is_in_help() -> None:
    for name in LottaLoraConfig.__annotations__:
        assert f"\n    {name}: " in str(LottaLoraConfig.__doc__)


def test_a_zero_scaffold_with_zero_adapters_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="Pass init_lora_weights=False"):
        LottaLoraConfig(seed=1, family="zero")
