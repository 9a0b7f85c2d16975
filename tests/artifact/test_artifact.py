from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import bert, config, gpt2, llama, logits, mlp, perturb, vit
from transformers import BertForSequenceClassification, LlamaForCausalLM

import hf_lottalora
from hf_lottalora import (
    AutoLottaLoraModel,
    AutoLottaLoraModelForCausalLM,
    AutoLottaLoraModelForSequenceClassification,
    LottaLoraConfig,
)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


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


def test_another_attention_implementation(saved: tuple[PeftModel, Path]) -> None:
    again = AutoLottaLoraModelForCausalLM.from_pretrained(saved[1], attn_implementation="eager")
    assert again.config._attn_implementation == "eager"
    torch.testing.assert_close(logits(again), logits(saved[0]))


@pytest.mark.parametrize(
    ("options", "says", "loader"),
    [
        ({}, "Nothing else is needed to rebuild it", True),
        ({"redraw": "none", "save_kept": True}, "frozen backbone[^#]*Nothing else is needed", True),
        ({"redraw": "none"}, r"frozen backbone[^#]*[\d,]+ frozen pretrained weights are not in it", False),
        (
            {"redraw": "targets"},
            r"random scaffold[^#]*drawn from seed 42 [^#]* not in it either: they come from the",
            False,
        ),
    ],
)
def test_the_card_says_what_is_needed(tmp_path: Path, options: dict[str, Any], says: str, loader: bool) -> None:
    get_peft_model(llama(), config(**options)).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert re.search(says, card.replace("\n", " "))
    assert ("AutoLottaLoraModelForCausalLM" in card) == loader


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


def test_every_byte_of_a_pretrained_base_is_compared_when_asked(tmp_path: Path) -> None:
    base = llama(hidden_size=96)
    get_peft_model(copy.deepcopy(base), config(redraw="none")).save_pretrained(tmp_path)
    PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).verify_scaffold(full=True)
    with torch.no_grad():
        base.model.layers[1].self_attn.q_proj.weight.view(-1)[100] += 1  # between the runs that are looked at
    again = PeftModel.from_pretrained(base, tmp_path)
    again.verify_scaffold()
    with pytest.raises(ValueError, match=r"'layers.1.self_attn.q_proj.weight' is not, to the byte, what the a"):
        again.verify_scaffold(full=True)
    again.save_pretrained(tmp_path)  # says what this one was made over
    PeftModel.from_pretrained(copy.deepcopy(again.unload()), tmp_path).verify_scaffold(full=True)


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
before = torch.get_rng_state()
from hf_lottalora import AutoLottaLoraModelForCausalLM
for threads in (1, 2):
    torch.set_num_threads(threads)
    model = AutoLottaLoraModelForCausalLM.from_pretrained(sys.argv[1])
    assert torch.equal(before, torch.get_rng_state())
    torch.set_num_threads(1)
    with torch.no_grad():
        logits = model(torch.arange(3, 24).view(3, 7)).logits
    print(logits.numpy().tobytes().hex())
"""


def test_a_fresh_process_gets_the_same_bits_with_one_or_two_threads(tmp_path: Path) -> None:
    model = get_peft_model(llama(hidden_size=512, intermediate_size=1024), config()).eval()  # several blocks per tensor
    perturb(model)
    model.save_pretrained(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        here = model(torch.arange(3, 24).view(3, 7)).logits.numpy().tobytes().hex()
    torch.set_num_threads(threads)
    command = [sys.executable, "-c", FRESH, str(tmp_path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == [here, here]


def test_without_the_import_peft_does_not_know_the_method(saved: tuple[PeftModel, Path]) -> None:
    code = """
import sys
from peft import PeftConfig
try:
    PeftConfig.from_pretrained(sys.argv[1])
except Exception as error:
    print(error)
import hf_lottalora
print(PeftConfig.from_pretrained(sys.argv[1]).peft_type.value)
"""
    command = [sys.executable, "-c", code, str(saved[1])]
    failed, known = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().rsplit("\n", 1)
    assert "LOTTALORA" in failed and known == "LOTTALORA"


# ---- what is refused, on every way in, before anything changes ---------------------------------------------------------


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


def test_config_reuse(tmp_path: Path) -> None:
    settings = config(task_type="SEQ_CLS")
    first = get_peft_model(bert(), settings)
    second = get_peft_model(bert(num_hidden_layers=1), settings)
    assert first.get_plan() is not None and len(second.get_plan().adapters) == 4
    second.save_pretrained(tmp_path)
    assert isinstance(LottaLoraConfig.from_pretrained(tmp_path), LottaLoraConfig)
    assert os.listdir(tmp_path) and hf_lottalora.FORMAT_VERSION == 1
    assert isinstance(first.base_model.model, BertForSequenceClassification)


@pytest.mark.parametrize("embeddings", ["train", "frozen", "lora"])
def test_embedding_layers_are_never_saved_on_top(tmp_path: Path, embeddings: str) -> None:
    model = get_peft_model(llama(tie_word_embeddings=True), config(embeddings=embeddings))
    model.save_pretrained(tmp_path / "plain")
    with pytest.warns() as said:
        model.save_pretrained(tmp_path / "asked", save_embedding_layers=True)
    assert all("adds nothing to a LottaLoRA artifact" in str(warning.message) for warning in said)
    assert (tmp_path / "asked" / WEIGHTS).read_bytes() == (tmp_path / "plain" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("embeddings", ["train", "frozen"])
def test_a_vocabulary_that_differs_from_the_pretrained_one(tmp_path: Path, embeddings: str) -> None:
    llama().save_pretrained(tmp_path / "pretrained")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "pretrained")
    base.resize_token_embeddings(120)
    with pytest.warns(UserWarning, match="pretrained"):
        model = get_peft_model(base, config(embeddings=embeddings))
    with warnings.catch_warnings():  # PEFT announces that it saves the resized embeddings, we that there is no need
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "artifact")
    again = AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path / "artifact")
    assert torch.equal(logits(again), logits(model))
