"""What Trainer decays, and what the groups we offer do: never beta, magnitudes, norms and biases, unless asked to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from test_training import state_of, trainer
from tiny import bert, config, llama, mlp
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_lottalora import LottaLoraConfig, parameter_groups

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "dora by input": {"use_dora": True, "dora_magnitude": "inputs"},
    "layer norm": {"layer_norm": True},
    "adapted embedding": {"embeddings": "lora", "r": 1},
    "some betas": {"train_beta_pattern": {"v_proj": False}},
}
OWN = ("lora_beta", "lora_magnitude", "lora_norm_weight", "lora_norm_bias")


def own(names: list[str]) -> set[str]:
    return {name for name in names if any(f".{kind}." in name for kind in OWN)}


def named(model: nn.Module, group: dict[str, Any]) -> list[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for parameter in group["params"]]


def trainers_optimizer(model: nn.Module, folder: Path, **arguments: Any) -> torch.optim.Optimizer:
    args = TrainingArguments(str(folder), use_cpu=True, report_to=[], **arguments)
    optimizer: torch.optim.Optimizer = Trainer(model=model, args=args).create_optimizer()
    return optimizer


def with_decay_of(settings: dict[str, Any], decay_beta: bool) -> LottaLoraConfig:
    return config(**settings, decay_beta=decay_beta)


@pytest.mark.parametrize("settings", OPTIONS.values(), ids=OPTIONS)
def test_what_a_plain_trainer_decays(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = get_peft_model(llama(), with_decay_of(settings, False))
    decayed, undecayed = trainers_optimizer(model, tmp_path, weight_decay=0.1).param_groups
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.1, 0.0)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    norms = {name for name in trainable if "layernorm" in name or name.endswith("model.norm.weight")}
    assert set(named(model, undecayed)) == own(trainable) | norms
    assert set(named(model, decayed)) == set(trainable) - own(trainable) - norms
    assert own(trainable)


@pytest.mark.parametrize("settings", OPTIONS.values(), ids=OPTIONS)
def test_the_switch_gives_the_groups_of_version_0_1(tmp_path: Path, settings: dict[str, Any]) -> None:
    """An optimizer's state goes by position, so the same names in the same order are the same checkpoint."""
    model = get_peft_model(llama(), with_decay_of(settings, True))
    optimizer = trainers_optimizer(model, tmp_path, weight_decay=0.1)
    old_names = {
        name: name.rpartition(".")[0] if own([name]) else name
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    undecayed = ("bias", "layernorm", "model.norm.")  # what Trainer's rule finds in these names of 0.1
    kept = [name for name, old in old_names.items() if any(part in old for part in undecayed)]
    assert named(model, optimizer.param_groups[0]) == [name for name in old_names if name not in kept]
    assert named(model, optimizer.param_groups[1]) == kept


@pytest.mark.parametrize(("decay_beta", "expected"), [(False, 1.0), (True, (1 - 1e-2 * 0.1) ** 500)])
def test_without_a_gradient_beta_stays(tmp_path: Path, decay_beta: bool, expected: float) -> None:
    settings = with_decay_of({"target_modules": ["0", "2"], "modules_to_save": ["4"], "use_dora": True}, decay_beta)
    model = get_peft_model(mlp(), settings)
    magnitudes = [p.clone() for name, p in model.named_parameters() if "lora_magnitude" in name]
    optimizer = trainers_optimizer(model, tmp_path, learning_rate=1e-2, weight_decay=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(500):
        optimizer.step()
    assert list(model.get_betas().values()) == pytest.approx([expected] * 2, abs=1e-4)
    after = [p for name, p in model.named_parameters() if "lora_magnitude" in name]
    for old, new in zip(magnitudes, after, strict=True):
        torch.testing.assert_close(new, old * expected, atol=1e-4, rtol=1e-4)


def test_a_checkpoint_resumes_with_the_same_switch_only(tmp_path: Path) -> None:
    def run(folder: str, decay_beta: bool) -> Trainer:
        torch.manual_seed(0)
        model = get_peft_model(bert(), config(decay_beta=decay_beta, layer_norm=True))
        return trainer(model, tmp_path / folder, weight_decay=0.1)

    whole = run("whole", True)
    whole.train()
    checkpoint = str(tmp_path / "whole" / "checkpoint-5")
    resumed = run("resumed", True)
    resumed.train(resume_from_checkpoint=checkpoint)
    expected, found = state_of(whole.model), state_of(resumed.model)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    with pytest.raises(ValueError, match="parameter group that doesn't match the size of optimizer's group"):
        run("other", False).train(resume_from_checkpoint=checkpoint)
    metadata = LottaLoraConfig.__dataclass_fields__["decay_beta"].metadata["help"]
    assert "checkpoint of 0.1" in metadata and "a parameter group doesn't match the size" in metadata


@pytest.mark.parametrize("decay_beta", [False, True])
def test_state_dicts_of_whole_models_load_under_every_name(decay_beta: bool) -> None:
    settings = {"use_dora": True, "layer_norm": True}
    model = get_peft_model(llama(), with_decay_of(settings, decay_beta))
    for parameter in model.parameters():
        parameter.data += parameter.requires_grad
    state = model.state_dict()
    assert len(own(list(state))) == 8 * 4
    for name_of_parameter in ("", ".norm", ".weight"):
        renamed = {
            name.rpartition(".")[0] + name_of_parameter if own([name]) else name: value for name, value in state.items()
        }
        again = get_peft_model(llama(), with_decay_of(settings, decay_beta))
        again.load_state_dict(renamed, strict=True)
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in state.items())


def test_artifacts_know_neither_name(tmp_path: Path) -> None:
    """The keys are those of 0.1 under both settings, and each loads into the other."""
    settings = {"use_dora": True, "layer_norm": True}
    keys = set()
    for decay_beta in (False, True):
        model = get_peft_model(llama(), with_decay_of(settings, decay_beta))
        model.save_pretrained(tmp_path / str(decay_beta))
        keys.add(frozenset(load_file(tmp_path / str(decay_beta) / "adapter_model.safetensors")))
        again = PeftModel.from_pretrained(llama(), tmp_path / str(decay_beta), is_trainable=True)
        assert [n for n, p in again.named_parameters() if p.requires_grad] == [
            n for n, p in model.named_parameters() if p.requires_grad
        ]
        again.load_adapter(tmp_path / "False", "default")
    assert len(keys) == 1
    assert {key.rpartition(".")[2] for key in keys.pop() if ".lora_" in key} == {*OWN, "weight"}


def names_by_group(model: nn.Module) -> dict[tuple[float, float], list[str]]:
    groups = parameter_groups(model, lr=1.0, weight_decay=0.1, lr_ratio=16, embedding_lr=0.5)
    assert all(group["params"] for group in groups)
    return {(group["lr"], group["weight_decay"]): named(model, group) for group in groups}


@pytest.mark.parametrize("decay_beta", [False, True])
@pytest.mark.parametrize("settings", OPTIONS.values(), ids=OPTIONS)
def test_the_groups_decay_as_trainer_does(tmp_path: Path, settings: dict[str, Any], decay_beta: bool) -> None:
    model = get_peft_model(llama(), with_decay_of(settings, decay_beta))
    decayed, undecayed = trainers_optimizer(model, tmp_path, weight_decay=0.1).param_groups
    found: dict[float, list[str]] = {0.1: [], 0.0: []}
    for (_, decay), names in names_by_group(model).items():
        found[decay] += names
    assert sorted(found[0.1]) == sorted(named(model, decayed))
    assert sorted(found[0.0]) == sorted(named(model, undecayed))


def test_the_rates_of_lora_plus() -> None:
    """Only B has B's rate, and embeddings have theirs, whole or adapted."""
    model = get_peft_model(bert(), config(use_dora=True, biases="train", modules_to_save=["pooler"]))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups = names_by_group(model)
    assert set(groups) == {(1.0, 0.1), (16.0, 0.1), (0.5, 0.1), (1.0, 0.0)}
    assert set(groups[16.0, 0.1]) == {name for name in trainable if ".lora_B." in name}
    assert set(groups[0.5, 0.1]) == {name for name in trainable if name.endswith("_embeddings.weight")}
    vectors = {name for name in trainable if name.endswith(("bias", "LayerNorm.weight"))} | own(list(trainable))
    assert set(groups[1.0, 0.0]) == vectors
    heads = {f"base_model.model.{name}.weight" for name in ("bert.pooler.dense", "classifier")}
    assert set(groups[1.0, 0.1]) == {name for name in trainable if ".lora_A." in name} | heads

    adapted = get_peft_model(llama(), config(embeddings="lora", r=1))
    ending = ("lora_embedding_A.default", "lora_embedding_B.default")
    assert all(name.endswith(ending) for name in names_by_group(adapted)[0.5, 0.1])
    assert len(names_by_group(adapted)[0.5, 0.1]) == 2


def test_the_groups_know_a_batch_norm_and_what_else_a_user_trains() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    model = get_peft_model(net, config(target_modules=["0"], modules_to_save=["2"]))
    model.base_model.model.add_module("more", nn.Linear(3, 3))
    groups = names_by_group(model)
    beta = "base_model.model.0.lora_beta.default.norm"
    assert set(groups[1.0, 0.0]) == {
        beta, *(f"base_model.model.{name}" for name in ("1.weight", "1.bias", "2.bias", "more.bias"))
    }  # fmt: skip
    assert "base_model.model.more.weight" in groups[1.0, 0.1]


def test_the_groups_train_under_trainer(tmp_path: Path) -> None:
    model = get_peft_model(bert(), config())
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3, weight_decay=0.1, lr_ratio=16))
    run = trainer(model, tmp_path, max_steps=2, optimizers=(optimizer, None))
    run.train()
    assert [group["initial_lr"] for group in run.optimizer.param_groups] == [1e-3, 16e-3, 1e-3, 1e-3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, r"lr must be a positive number, got 0.0"),
        ({"lr": 1.0, "lr_ratio": -1}, r"lr_ratio must be a positive number, got -1"),
        ({"lr": 1.0, "embedding_lr": float("inf")}, r"embedding_lr must be a positive number, got inf"),
        ({"lr": 1.0, "weight_decay": -0.1}, r"weight_decay must be a number that is not negative, got -0.1"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parameter_groups(get_peft_model(llama(), config()), **options)


def test_a_model_that_trains_nothing_is_refused(tmp_path: Path) -> None:
    get_peft_model(llama(), config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="No parameter of the model is trained. Load it with is_trainable=True"):
        parameter_groups(PeftModel.from_pretrained(llama(), tmp_path), lr=1.0)
    with pytest.raises(ValueError, match="Expected a PeftModel with a LottaLoRA adapter, got LlamaForCausalLM"):
        parameter_groups(llama(), lr=1.0)
