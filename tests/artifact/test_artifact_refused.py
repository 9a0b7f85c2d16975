"""What is refused when an artifact is saved or loaded, with nothing changed by then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import config, llama, logits

from hf_lottalora import (
    AutoLottaLoraModel,
    AutoLottaLoraModelForCausalLM,
    AutoLottaLoraModelForSequenceClassification,
    ScaffoldTensor,
)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def edit_config(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / CONFIG).read_text())
    content.update(changes)
    content = {key: value for key, value in content.items() if value is not ...}
    (folder / CONFIG).write_text(json.dumps(content))


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(folder / WEIGHTS)
    for key, value in changes.items():
        name = key if key == "lottalora_manifest" else f"base_model.model.{key.replace('__', '.')}"
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, folder / WEIGHTS)


def edit_manifest(folder: Path, **changes: Any) -> None:
    content = json.loads(bytes(load_file(folder / WEIGHTS)["lottalora_manifest"].numpy()))
    content.update(changes)
    content = {key: value for key, value in content.items() if value is not ...}
    edit_weights(
        folder, lottalora_manifest=torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)
    )


def truncate(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def pickle_instead(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


BOTH = "config and weights"
BROKEN = {
    "truncated": (truncate, BOTH, "not a readable safetensors file|deserializing"),
    "no manifest": (lambda f: edit_weights(f, lottalora_manifest=None), BOTH, "has no 'lottalora_manifest'"),
    "edited manifest": (lambda f: edit_manifest(f, digest="00"), BOTH, "was edited: its digests do not add up"),
    "manifest is not JSON": (
        lambda f: edit_weights(f, lottalora_manifest=torch.zeros(3, dtype=torch.uint8)), BOTH, "damaged 'lottalora_manifest'",
    ),
    "newer format in the weights": (lambda f: edit_manifest(f, format_version=2), BOTH, "scaffold format 2 .*Upgrade"),
    "missing key": (
        lambda f: edit_weights(f, model__norm__weight=None), BOTH, r"lacks 'base_model.model.model.norm.weight'|expected the \d+ tensors that were saved",
    ),
    "foreign key": (lambda f: edit_weights(f, spy=torch.ones(1)), BOTH, "has the foreign key 'base_model.model.spy'|tensors that were saved"),
    "wrong shape": (
        lambda f: edit_weights(f, model__norm__weight=torch.ones(31)), BOTH, r"norm.weight' (with shape \(31,\), expected \(32,\)|is not the tensor that was saved)",
    ),
    "pickled": (pickle_instead, "config", "weights in adapter_model.bin, a pickle"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "config", "has no adapter_model.safetensors"),
    "other seed in the config": (lambda f: edit_config(f, seed=43), "config", "belongs to seed 42, but .* says 43"),
    "no seed": (lambda f: edit_config(f, seed=...), "config", "has no 'seed'"),
    "no format version": (lambda f: edit_config(f, format_version=...), "config", "has no 'format_version'"),
    "newer format in the config": (lambda f: edit_config(f, format_version=2), "config", "Scaffold format 2 .* Upgrade"),
    "other family in the config": (lambda f: edit_config(f, family="binary"), "config", "adapter_config.json: family: expected 'normal'.* found 'binary'"),
    "other options in the config": (
        lambda f: edit_config(f, embeddings="frozen"), "config", "adapter_config.json: embeddings: expected 'train'.* found 'frozen'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_artifact_is_refused_with_nothing_changed(saved: tuple[PeftModel, Path], case: str) -> None:
    breaking, where, message = BROKEN[case]
    model, folder = saved
    breaking(folder)
    base = llama()  # seen before a base model is touched
    before = {name: value.clone() for name, value in base.state_dict().items()}
    with pytest.raises((ValueError, TypeError), match=message):
        PeftModel.from_pretrained(base, folder)
    after = base.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises((ValueError, TypeError), match=message):
        AutoLottaLoraModelForCausalLM.from_pretrained(folder)
    if where != "config":  # Trainer's way: into an existing adapter, the config is never read
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(Exception, match=message):
            model.load_adapter(folder, "default")
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({}, {"seed": 43}, "belongs to seed 42, this model's scaffold is drawn from seed 43. Nothing was loaded"),
        ({"intermediate_size": 64}, {}, "another backbone: 'layers.0.mlp.down_proj.weight' has digest"),
        ({"num_hidden_layers": 3}, {}, "'layers.2.mlp.down_proj.weight' is in this model but not in the artifact"),
        ({}, {"scale": 0.3}, "'layers.0.mlp.down_proj.weight' has digest"),
        ({}, {"target_modules": "all-linear"}, "lacks 'base_model.model.model.layers.0.mlp.down_proj.lora_A.weight'"),
        ({}, {"r": 2}, r"lora_A.weight' with shape \(4, 32\), expected \(2, 32\)"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(
    saved: tuple[PeftModel, Path], changes: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    other = get_peft_model(llama(**changes), config(**settings))
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        other.load_adapter(saved[1], "default")
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_an_artifact_over_another_architecture_is_refused(saved: tuple[PeftModel, Path]) -> None:
    with pytest.raises(ValueError, match=r"another backbone: 'layers.0.mlp.down_proj.weight' has digest"):
        PeftModel.from_pretrained(llama(intermediate_size=64), saved[1])


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_attention_heads", 2), ("hidden_act", "relu"), ("rms_norm_eps", 0.1), ("pad_token_id", 0)],
)
def test_an_architecture_of_the_same_shapes_that_computes_something_else_is_refused(
    saved: tuple[PeftModel, Path], key: str, value: Any
) -> None:
    more = {"head_dim": 16, "num_key_value_heads": 2} if key == "num_attention_heads" else {}
    with pytest.raises(ValueError, match=r"another architecture: its config.json says \w+="):
        PeftModel.from_pretrained(llama(**{key: value}, **more), saved[1])


@pytest.mark.parametrize("loader", [AutoLottaLoraModel, AutoLottaLoraModelForSequenceClassification])
def test_another_loader_than_the_artifacts_names_the_right_one(saved: tuple[PeftModel, Path], loader: Any) -> None:
    with pytest.raises(
        ValueError, match=r"is a LlamaForCausalLM, which \w+ does not build. Use AutoLottaLoraModelForC"
    ):
        loader.from_pretrained(saved[1])


def test_a_plain_lora_adapter_is_not_taken_for_ours(tmp_path: Path) -> None:
    get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a .*LORA adapter, expected LOTTALORA"):
        AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path)
    model = get_peft_model(llama(), config())
    with pytest.raises(ValueError, match="a plain LoRA adapter does not fit a random backbone"):
        model.load_adapter(tmp_path, "default")


def test_pickled_saving_is_refused_and_the_artifact_there_stays(saved: tuple[PeftModel, Path]) -> None:
    model, folder = saved
    before = {name: (folder / name).read_bytes() for name in ("adapter_config.json", "config.json", WEIGHTS)}
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    with pytest.raises(ValueError, match=r"would write a pickle, adapter_model.bin; .* safetensors only"):
        model.save_pretrained(folder, safe_serialization=False)
    assert {name: (folder / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("change", [{"lora_alpha": 16}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 3}}])
def test_going_on_with_another_scaling_is_refused(saved: tuple[PeftModel, Path], change: dict[str, Any]) -> None:
    other = get_peft_model(llama(), config(**change))
    before = logits(other)
    with pytest.raises(ValueError, match=r"B A of '\S+q_proj' scaled by \S+ \(alpha / r\), this model scales it by"):
        other.load_adapter(saved[1], "default")
    assert torch.equal(logits(other), before)


def test_an_output_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    model = get_peft_model(llama(), config())
    with pytest.raises(ValueError, match="should be a directory, not a file"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(OSError, match="Not a directory"):
        model.save_pretrained(tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("rows", [120, 60])
@pytest.mark.parametrize("options", [{}, {"embeddings": "frozen"}, {"embeddings": "frozen", "redraw": "none"}])
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_a_model_that_was_resized_later_is_refused_before_anything_is_overwritten(
    options: dict[str, Any], rows: int, tie: bool, tmp_path: Path
) -> None:
    model = get_peft_model(llama(tie_word_embeddings=tie), config(**options, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    files = {file: file.read_bytes() for file in tmp_path.iterdir() if file.name != "README.md"}  # PEFT writes it first
    model.get_base_model().resize_token_embeddings(rows, mean_resizing=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    message = rf"The model has '\S+' with shape \({rows}, 32\), expected \(99, 32\). Change a .* before get_peft_model"
    attempts: list[Any] = [
        lambda: model.save_pretrained(tmp_path),
        lambda: model.load_adapter(tmp_path, "default"),
        lambda: model.add_adapter("other", config(**options)),
        lambda: model.set_residency("packed"),
    ]
    if "redraw" not in options:
        attempts += [lambda: model.set_scaffold_seed(43), lambda: model.scaffold_off().__enter__()]
    if options == {"embeddings": "frozen"}:
        attempts += [lambda full=full: model.verify_scaffold(full=full) for full in (False, True)]
    else:
        attempts += [lambda: model.disable_adapter().__enter__()] if "redraw" not in options else []
    for attempt in attempts:
        with pytest.raises(ValueError, match=message):
            attempt()
        after = model.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert files == {file: file.read_bytes() for file in files}


@pytest.mark.parametrize("family", ["normal", "binary", "orthogonal"])
@pytest.mark.parametrize("full", [True, False])
def test_a_tensor_of_another_shape_is_not_what_is_drawn(family: str, full: bool) -> None:
    spec = ScaffoldTensor("a", (8, 8), 1, family)
    drawn = spec.draw()
    assert spec.is_in(drawn, full)
    for other in (drawn.flatten(), drawn[None], drawn[:1], torch.cat([drawn, drawn]), drawn.view(4, 16)):
        assert not spec.is_in(other, full)
