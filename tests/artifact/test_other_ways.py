"""What users of transformers and PEFT try with an artifact: it works, or what they read says what does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftModel,
    PeftModelForCausalLM,
    get_peft_model,
)
from safetensors.torch import load_file
from tiny import bert, config, llama, logits, mlp, perturb, vit
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast, pipeline

from hf_lottalora import AutoLottaLoraModelForCausalLM, LottaLoraConfig


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(99)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w1", eos_token="w2")


# ---- AutoPeftModel ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("auto", [AutoPeftModelForCausalLM, AutoPeftModel])
@pytest.mark.parametrize("residency", [None, "packed"])
def test_auto_peft_models(saved: tuple[PeftModel, Path], auto: Any, residency: str | None) -> None:
    model, folder = saved
    again = auto.from_pretrained(folder, residency=residency, import_allowlist=["transformers"], revision=None)
    assert type(again) is PeftModelForCausalLM and not again.training
    assert torch.equal(logits(again), logits(model))
    assert again.base_model.residency == (residency or "dense")
    other = auto.from_pretrained(folder, "mine", True)
    assert list(other.peft_config) == ["mine"] and any(p.requires_grad for p in other.parameters())


def test_an_auto_peft_model_without_task_type(tmp_path: Path) -> None:
    for number, (model, auto) in enumerate(
        [(vit(), AutoPeftModel), (llama().model, AutoPeftModelForFeatureExtraction)]
    ):
        adapted = get_peft_model(model, config())
        folder = tmp_path / str(number)
        adapted.save_pretrained(folder)
        again = auto.from_pretrained(folder).state_dict()
        assert all(torch.equal(value, again[name]) for name, value in adapted.state_dict().items())


def test_the_wrong_auto_peft_model_names_the_right_loader(saved: tuple[PeftModel, Path], tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="is a LlamaForCausalLM, which .* does not build. Use AutoLottaLoraModelForCausalLM"
    ):
        AutoPeftModelForSequenceClassification.from_pretrained(saved[1])
    with pytest.raises(TypeError, match=r"does not take \['quantization_config'\]. .* drawn, not stored"):
        AutoPeftModelForCausalLM.from_pretrained(saved[1], quantization_config={})
    get_peft_model(mlp(), config(target_modules=["0"], modules_to_save=["4"])).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="has no config.json, so the architecture is unknown"):
        AutoPeftModel.from_pretrained(tmp_path / "plain")


def test_auto_peft_models_with_a_base_are_pefts(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    for options in (
        config(redraw="none", task_type="CAUSAL_LM"),
        LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
    ):
        base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        model = get_peft_model(base, options)
        perturb(model)
        model.save_pretrained(tmp_path / "adapter")
        again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", is_trainable=True)
        assert torch.equal(logits(again), logits(model)) and type(again) is type(model)
        (tmp_path / "base" / "model.safetensors").rename(tmp_path / "weights")
        torch.save(load_file(tmp_path / "weights"), tmp_path / "base" / "pytorch_model.bin")
        if isinstance(options, LottaLoraConfig):  # a pickle, which is not read unasked
            with pytest.raises(ValueError, match="could not be read: .* no file named model.safetensors"):
                AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", use_safetensors=False)
        (tmp_path / "weights").rename(tmp_path / "base" / "model.safetensors")
    assert AutoPeftModelForCausalLM.from_pretrained.__doc__ == AutoPeftModel.from_pretrained.__doc__
    with pytest.raises(ValueError, match="Can't find 'adapter_config.json'"):
        AutoPeftModel.from_pretrained(tmp_path)


@pytest.mark.smoke
def test_auto_peft_model_in_a_new_process(saved: tuple[PeftModel, Path]) -> None:
    code = f"from peft import AutoPeftModelForCausalLM as A; A.from_pretrained({str(saved[1])!r})"
    done = subprocess.run([sys.executable, "-c", f"import hf_lottalora; {code}"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- AutoModel and pipeline -------------------------------------------------------------------------------------------


def test_what_transformers_cannot_load_the_card_says(saved: tuple[PeftModel, Path]) -> None:
    model, folder = saved
    with pytest.raises(OSError, match=r"model.safetensors|huggingface.co"):  # newer and older transformers
        AutoModelForCausalLM.from_pretrained(folder)
    card = (folder / "README.md").read_text()
    assert '`AutoModel` and `pipeline(task, model="path/to/this/folder")` cannot load it' in card
    (call,) = re.findall(r"`(pipeline\(task, model=model.*?\))`", card)
    scope = {"pipeline": pipeline, "task": "text-generation", "tokenizer": tokenizer()}
    for scope["model"] in (model, AutoLottaLoraModelForCausalLM.from_pretrained(folder)):
        generate = eval(call, dict(scope))
        (said,) = generate("w3 w4 w5", max_new_tokens=4, do_sample=False, return_tensors=True)
        with torch.no_grad():
            expected = model.generate(input_ids=torch.tensor([[3, 4, 5]]), max_new_tokens=4, do_sample=False)[0, 3:]
        assert said["generated_token_ids"][-len(expected) :] == expected.tolist()


def test_a_classifier_in_a_pipeline() -> None:
    model = get_peft_model(bert(), config(task_type="SEQ_CLS")).eval()
    perturb(model)
    (said,) = pipeline("text-classification", model=model, tokenizer=tokenizer())("w3 w4")
    with torch.no_grad():
        expected = model(torch.tensor([[3, 4]])).logits.softmax(-1)[0].max().item()
    assert said["score"] == pytest.approx(expected)


def test_a_plain_modules_card_speaks_of_no_pipeline(tmp_path: Path) -> None:
    get_peft_model(mlp(), config(target_modules=["0"], modules_to_save=["4"])).save_pretrained(tmp_path)
    assert "pipeline" not in (tmp_path / "README.md").read_text()


# ---- resizing the vocabulary ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("embeddings", ["train", "frozen", "lora"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabulary_is_resized_before_or_after(tmp_path: Path, embeddings: str, tied: bool) -> None:
    options = config(embeddings=embeddings)
    model = get_peft_model(llama(tie_word_embeddings=tied), options)
    perturb(model)
    before = logits(model)
    for wanted in ({"new_num_tokens": 120}, {"new_num_tokens": 99, "pad_to_multiple_of": 8}, {"new_num_tokens": 50}):
        with pytest.raises(
            ValueError, match=r"has 99 entries and cannot become \d+ .* before get_peft_model.* merge_and_unload\(\)"
        ):
            model.resize_token_embeddings(**wanted)
    for same in ({}, {"new_num_tokens": 99}, {"pad_to_multiple_of": 3}):
        assert model.resize_token_embeddings(**same) is model.get_input_embeddings()
    assert torch.equal(logits(model), before)

    base = llama(tie_word_embeddings=tied)
    base.resize_token_embeddings(120)
    earlier = get_peft_model(base, options)
    earlier.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path)), logits(earlier))
    merged = model.merge_and_unload()
    merged.resize_token_embeddings(120)
    torch.testing.assert_close(logits(merged)[..., :99], before, rtol=1e-4, atol=1e-4)


def test_a_layer_of_another_shape_is_not_saved(tmp_path: Path) -> None:
    """The kind: what is drawn on loading would have the planned shape, whatever stands there now."""
    model = get_peft_model(llama(), config())
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    layer.weight = nn.Parameter(torch.cat([layer.weight, layer.weight]), requires_grad=False)
    with pytest.raises(ValueError, match=r"down_proj.weight' with shape \(64, 48\)"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_model.safetensors").exists()
