from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import bert, config, gpt2, ids, llama, mlp, perturb, t5, vit
from transformers import BertForSequenceClassification, LlamaForCausalLM

import hf_lottalora
from hf_lottalora import (
    AutoLottaLoraModel,
    AutoLottaLoraModelForCausalLM,
    AutoLottaLoraModelForSeq2SeqLM,
    AutoLottaLoraModelForSequenceClassification,
    LottaLoraConfig,
)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def saved(tmp_path: Path) -> tuple[PeftModel, Path]:
    """A trained Llama adapter and where it was saved."""
    model = get_peft_model(llama(), config(task_type="CAUSAL_LM")).eval()
    perturb(model)
    model.save_pretrained(tmp_path / "artifact")
    return model, tmp_path / "artifact"


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(ids()).logits
    return result


def test_exactly_these_files_and_tensors(saved: tuple[PeftModel, Path]) -> None:
    model, folder = saved
    assert {file.name for file in folder.iterdir()} == {WEIGHTS, CONFIG, "config.json", "README.md"}
    tensors = load_file(folder / WEIGHTS)
    adapters = {
        f"model.layers.{i}.self_attn.{p}_proj.{kind}"
        for i in range(2)
        for p in "qkvo"
        for kind in ("lora_A.weight", "lora_B.weight", "lora_beta")
    }
    norms = {"model.norm.weight"} | {
        f"model.layers.{i}.{name}.weight" for i in range(2) for name in ("input_layernorm", "post_attention_layernorm")
    }
    expected = {f"base_model.model.{name}" for name in adapters | norms | {"model.embed_tokens.weight"}}
    assert set(tensors) == expected | {"lottalora_manifest"}
    written = json.loads((folder / CONFIG).read_text())
    assert written["seed"] == 42 and written["format_version"] == 1 and written["generator"] == "philox4x64-10"
    assert written["family"] == "normal" and written["scale"] == "fan_in" and written["lottalora_version"]
    assert written["base_model_name_or_path"] is None
    assert set(written["scaffold_digests"]) == {spec.name for spec in model.get_plan().scaffold.values()}
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_the_card_shows_lines_that_load_it(saved: tuple[PeftModel, Path]) -> None:
    model, folder = saved
    card = (folder / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    scope: dict[str, Any] = {}
    exec(code.replace("path/to/this/folder", str(folder)), scope)
    assert torch.equal(logits(scope["model"]), logits(model))
    model.save_pretrained(folder)
    assert (folder / "README.md").read_text() == card  # saving again repeats nothing


def test_a_users_card_is_kept(saved: tuple[PeftModel, Path]) -> None:
    model, folder = saved
    (folder / "README.md").write_text("---\nlicense: mit\n---\nMy words.\n")
    for _ in range(2):
        model.save_pretrained(folder)
        card = (folder / "README.md").read_text()
        assert card.count("My words.") == 1 and card.count("over a random scaffold") == 1 and "license: mit" in card


@pytest.mark.parametrize("embeddings", ["train", "frozen", "lora"])
@pytest.mark.parametrize("build", [llama, gpt2])
def test_both_ways_back_are_exact(tmp_path: Path, build: Any, embeddings: str) -> None:
    model = get_peft_model(build(), config(embeddings=embeddings, biases="train")).eval()
    perturb(model)
    model.save_pretrained(tmp_path)
    over_a_base = PeftModel.from_pretrained(build(), tmp_path)
    alone = AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path)
    for again in (over_a_base, alone):
        assert isinstance(again, PeftModel) and not again.training
        assert torch.equal(logits(again), logits(model))
        assert not any(parameter.requires_grad for parameter in again.parameters())
        state = again.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        base = again.base_model.model
        tied = [base.get_input_embeddings(), base.get_output_embeddings()]
        assert getattr(tied[0], "base_layer", tied[0]).weight is getattr(tied[1], "base_layer", tied[1]).weight


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


def test_training_goes_on_where_it_stopped(saved: tuple[PeftModel, Path]) -> None:
    model, folder = saved
    again = AutoLottaLoraModelForCausalLM.from_pretrained(folder, is_trainable=True)
    wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert wanted == {name for name, parameter in again.named_parameters() if parameter.requires_grad}


def test_low_cpu_mem_usage(saved: tuple[PeftModel, Path]) -> None:
    model, folder = saved
    again = PeftModel.from_pretrained(llama(), folder, low_cpu_mem_usage=True)
    assert not any(parameter.is_meta for parameter in again.parameters())
    assert torch.equal(logits(again), logits(model))


def test_a_second_adapter_saves_and_loads_beside_the_first(tmp_path: Path) -> None:
    model = get_peft_model(llama(), config()).eval()
    model.add_adapter("other", config(adapter_seed=1, embeddings="lora"))
    results = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        perturb(model)
        results[name] = logits(model)
    model.set_adapter("default")
    model.save_pretrained(tmp_path)  # "other" is not installed while it is saved
    assert "base_model.model.model.embed_tokens.weight" not in load_file(tmp_path / "other" / WEIGHTS)
    again = AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path)
    again.load_adapter(tmp_path / "other", "other")
    for name, expected in results.items():
        again.set_adapter(name)
        assert torch.equal(logits(again), expected), name
    assert torch.equal(logits(AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path / "other")), results["other"])


def test_a_plain_module(tmp_path: Path) -> None:
    settings = config(target_modules=["0", "2"], modules_to_save=["4"])
    model = get_peft_model(mlp(), settings)
    perturb(model)
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {WEIGHTS, CONFIG, "README.md"}
    assert "hf_lottalora" in (tmp_path / "README.md").read_text()
    x = torch.ones(2, 12)
    assert torch.equal(PeftModel.from_pretrained(mlp(), tmp_path)(x), model(x))
    with pytest.raises(ValueError, match="has no config.json, so the architecture is unknown"):
        AutoLottaLoraModel.from_pretrained(tmp_path)


def test_noise_on_a_pretrained_network_needs_that_network(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match="redraw='targets' draws over"):
        model = get_peft_model(base, config(redraw="targets", embeddings="frozen")).eval()
    perturb(model)
    model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / WEIGHTS)
    assert not any("mlp" in name or "embed" in name for name in saved)
    again = AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(ValueError, match=r"over another backbone: 'embed_tokens.weight' has digest"):
        PeftModel.from_pretrained(llama(), tmp_path / "adapter")


@pytest.mark.parametrize("redraw", ["targets", "none"])
def test_save_kept_makes_it_self_contained(tmp_path: Path, redraw: str) -> None:
    model = get_peft_model(llama(), config(redraw=redraw, save_kept=True)).eval()
    perturb(model)
    model.save_pretrained(tmp_path)
    again = AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert not any("self_attn" in name and name.endswith("proj.weight") for name in load_file(tmp_path / WEIGHTS)) == (
        redraw == "targets"
    )


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
def test_a_classifier_with_pefts_task_type(tmp_path: Path, task_type: str | None) -> None:
    model = get_peft_model(bert(), config(task_type=task_type)).eval()
    perturb(model)
    model.save_pretrained(tmp_path)
    assert "base_model.model.classifier.weight" in load_file(tmp_path / WEIGHTS)
    for again in (
        PeftModel.from_pretrained(bert(), tmp_path),
        AutoLottaLoraModelForSequenceClassification.from_pretrained(tmp_path),
    ):
        assert type(again) is type(model)
        assert torch.equal(logits(again), logits(model))


FRESH = """
import sys, torch
torch.set_num_threads(int(sys.argv[2]))
before = torch.get_rng_state()
from hf_lottalora import AutoLottaLoraModelForCausalLM
model = AutoLottaLoraModelForCausalLM.from_pretrained(sys.argv[1])
assert torch.equal(before, torch.get_rng_state())
torch.set_num_threads(1)
with torch.no_grad():
    logits = model(torch.arange(3, 24).view(3, 7)).logits
sys.stdout.write(logits.numpy().tobytes().hex())
"""


def test_fresh_processes_get_the_same_bits_with_one_or_two_threads(tmp_path: Path) -> None:
    model = get_peft_model(llama(hidden_size=512, intermediate_size=1024), config()).eval()  # several blocks per tensor
    perturb(model)
    model.save_pretrained(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        here = model(torch.arange(3, 24).view(3, 7)).logits.numpy().tobytes().hex()
    torch.set_num_threads(threads)
    for count in ("1", "2"):
        command = [sys.executable, "-c", FRESH, str(tmp_path), count]
        there = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert there == here, f"{count} threads"


def test_without_the_import_peft_does_not_know_the_method(saved: tuple[PeftModel, Path]) -> None:
    code = f"from peft import PeftConfig; PeftConfig.from_pretrained({str(saved[1])!r})"
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert failed.returncode != 0 and "LOTTALORA" in failed.stderr
    done = subprocess.run([sys.executable, "-c", f"import hf_lottalora; {code}"], capture_output=True, check=False)
    assert done.returncode == 0


# ---- what is refused, on every way in, before anything changes ---------------------------------------------------------


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
        lambda f: edit_weights(f, model__norm__weight=None), BOTH, r"lacks 'base_model.model.model.norm.weight'",
    ),
    "foreign key": (lambda f: edit_weights(f, spy=torch.ones(1)), BOTH, "has the foreign key 'base_model.model.spy'"),
    "wrong shape": (
        lambda f: edit_weights(f, model__norm__weight=torch.ones(31)), BOTH, r"norm.weight' with shape \(31,\), expected \(32,\)",
    ),
    "pickled": (pickle_instead, "config", "weights in adapter_model.bin, a pickle"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "config", "has no adapter_model.safetensors"),
    "other seed in the config": (lambda f: edit_config(f, seed=43), "config", "belongs to seed 42, but .* says 43"),
    "no seed": (lambda f: edit_config(f, seed=...), "config", "has no 'seed'"),
    "no format version": (lambda f: edit_config(f, format_version=...), "config", "has no 'format_version'"),
    "newer format in the config": (lambda f: edit_config(f, format_version=2), "config", "Scaffold format 2 .* Upgrade"),
    "other family in the config": (lambda f: edit_config(f, family="binary"), "config", "'layers.0.mlp.down_proj.weight' has digest"),
    "other options in the config": (
        lambda f: edit_config(f, embeddings="frozen"), "config", "'embed_tokens.weight' is in this model but not in the artifact",
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


def test_a_model_on_the_meta_device() -> None:
    with torch.device("meta"):
        hollow = llama()
    with pytest.raises(ValueError, match="inv_freq' is on the meta device.*include_buffers=False"):
        get_peft_model(hollow, config())
    with init_empty_weights(include_buffers=False):
        empty = llama()
    empty.tie_weights()
    with pytest.raises(ValueError, match="is neither drawn nor saved.* or pass redraw='all'"):
        get_peft_model(empty, config(redraw="none"))
    drawn = get_peft_model(empty, config())
    assert torch.equal(logits(drawn.eval()), logits(get_peft_model(llama(), config()).eval()))


@pytest.mark.parametrize(("key", "value"), [("num_attention_heads", 2), ("hidden_act", "relu"), ("rms_norm_eps", 0.1)])
def test_an_architecture_of_the_same_shapes_that_computes_something_else_is_refused(
    saved: tuple[PeftModel, Path], key: str, value: Any
) -> None:
    more = {"head_dim": 16, "num_key_value_heads": 2} if key == "num_attention_heads" else {}
    with pytest.raises(ValueError, match=r"another architecture: its config.json says \w+="):
        PeftModel.from_pretrained(llama(**{key: value}, **more), saved[1])


def test_a_plain_lora_adapter_is_not_taken_for_ours(tmp_path: Path) -> None:
    get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a .*LORA adapter, expected LOTTALORA"):
        AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path)
    model = get_peft_model(llama(), config())
    with pytest.raises(ValueError, match="a plain LoRA adapter does not fit a random backbone"):
        model.load_adapter(tmp_path, "default")


def test_pickled_saving_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="LottaLoRA artifacts are safetensors only"):
        get_peft_model(llama(), config()).save_pretrained(tmp_path, safe_serialization=False)


def test_an_output_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    model = get_peft_model(llama(), config())
    with pytest.raises(ValueError, match="should be a directory, not a file"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(OSError, match="Not a directory"):
        model.save_pretrained(tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"


def test_no_scaffold_weight_is_ever_saved(tmp_path: Path) -> None:
    for i, build in enumerate((llama, bert, gpt2, vit)):
        model = get_peft_model(build(), config())
        model.save_pretrained(tmp_path / str(i), save_embedding_layers=False)
        saved = load_file(tmp_path / str(i) / WEIGHTS)
        live = dict(model.base_model.model.named_parameters())
        for path, spec in model.get_plan().scaffold.items():
            assert f"base_model.model.{path}" not in saved
            drawn = spec.draw()
            assert not any(v.shape == drawn.shape and torch.equal(v, drawn) for v in saved.values())
        assert live


def test_a_model_that_was_resized_later_is_refused_before_anything_is_overwritten(
    saved: tuple[PeftModel, Path],
) -> None:
    model, folder = saved
    before = (folder / WEIGHTS).read_bytes()
    model.resize_token_embeddings(120)
    with pytest.raises(ValueError, match=r"embed_tokens.weight' with shape \(120, 32\).* before get_peft_model"):
        model.save_pretrained(folder)
    assert (folder / WEIGHTS).read_bytes() == before


def test_config_reuse(tmp_path: Path) -> None:
    settings = config(task_type="SEQ_CLS")
    first = get_peft_model(bert(), settings)
    second = get_peft_model(bert(num_hidden_layers=1), settings)
    assert first.get_plan() is not None and len(second.get_plan().adapters) == 4
    second.save_pretrained(tmp_path)
    assert isinstance(LottaLoraConfig.from_pretrained(tmp_path), LottaLoraConfig)
    assert os.listdir(tmp_path) and hf_lottalora.FORMAT_VERSION == 1
    assert isinstance(first.base_model.model, BertForSequenceClassification)
