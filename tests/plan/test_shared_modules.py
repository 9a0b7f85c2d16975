"""One module in several places: it works everywhere, or it is refused by name before anything has changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import config, ids, perturb, t5
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration

from hf_lottalora import AutoLottaLoraModelForSeq2SeqLM, make_plan
from hf_lottalora.paths import clean_modules


class Twice(nn.Module):
    """One layer under two names of the same parent, or of two, or within a parent that stands in two places."""

    def __init__(self, how: str, layer: Callable[[], nn.Module] = lambda: nn.Linear(8, 8)) -> None:
        super().__init__()
        if how == "names":
            self.first = layer()
            self.second = self.first
        elif how == "parents":
            self.first, self.second = nn.Sequential(layer()), nn.Sequential()
            self.second.append(self.first[0])
        elif how == "list":
            self.blocks = nn.ModuleList([nn.Sequential(layer())] * 2)
        else:
            self.first = nn.Sequential(nn.Sequential(layer()))
            self.second = nn.Sequential(self.first[0])
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for module in self.blocks if hasattr(self, "blocks") else (self.first, self.second):
            x = module(x).relu()
        result: torch.Tensor = self.head(x.flatten(2).transpose(1, 2) if x.dim() > 3 else x)
        return result


def test_every_path_of_a_module_is_found() -> None:
    for how in ("names", "parents", "list", "above"):
        paths = [path for path, _ in clean_modules(Twice(how))]
        named = [path for path, _ in Twice(how).named_modules(remove_duplicate=False)]
        assert paths == named


@pytest.mark.parametrize("how", ["names", "parents"])
@pytest.mark.parametrize("layer", [lambda: nn.Linear(8, 8), lambda: nn.Conv1d(8, 8, 1)])
def test_an_adapter_that_would_miss_a_place_is_refused(how: str, layer: Any) -> None:
    places = {"names": "first, second", "parents": "first.0, second.0"}[how]
    for targets in places.split(", "):
        model = Twice(how, layer)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(
            ValueError, match=rf"is one module in several places \({places}\): an adapter would take one"
        ):
            get_peft_model(model, config(target_modules=[targets], modules_to_save=["head"]))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert make_plan(Twice(how, layer), config(target_modules=["head"])).scaffold


@pytest.mark.parametrize("how", ["list", "above"])
def test_an_adapter_within_a_shared_module_is_in_all_its_places(how: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"target_modules": ["0"], "modules_to_save": ["head"]}
    model = get_peft_model(Twice(how), config(**options)).eval()
    perturb(model)
    x = torch.randn(5, 8)
    expected = model(x)
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        again = PeftModel.from_pretrained(Twice(how), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(again(x), expected)
    model.merge_adapter()
    assert torch.allclose(model(x), expected, atol=1e-6)
    model.unmerge_adapter()
    assert torch.equal(model(x), expected)
    assert torch.allclose(model.merge_and_unload()(x), expected, atol=1e-6)


def bart() -> BartForConditionalGeneration:
    sizes = {f"{part}_{what}": 4 for part in ("encoder", "decoder") for what in ("attention_heads", "ffn_dim")}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 40}
    return BartForConditionalGeneration(BartConfig(vocab_size=99, d_model=32, **sizes, **layers))


@pytest.mark.parametrize("build", [t5, bart])
@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_an_encoder_decoder_whose_vocabulary_was_resized(build: Any, tmp_path: Path) -> None:
    def resized() -> Any:
        model = build()
        model.resize_token_embeddings(110, mean_resizing=False)  # makes one module of its token embeddings
        return model

    message = r"its table is looked up through several modules \((model\.)?shared, (model\.)?encoder.embed_tokens, "
    for model in (build(), resized()):
        with pytest.raises(ValueError, match=message):
            get_peft_model(model, config(embeddings="lora"))
    for embeddings in ("train", "frozen"):
        model = get_peft_model(resized(), config(embeddings=embeddings, task_type="SEQ_2_SEQ_LM")).eval()
        perturb(model)
        expected = model(input_ids=ids(), decoder_input_ids=ids()).logits
        model.save_pretrained(tmp_path / embeddings)
        again = AutoLottaLoraModelForSeq2SeqLM.from_pretrained(tmp_path / embeddings)
        assert torch.equal(again(input_ids=ids(), decoder_input_ids=ids()).logits, expected)
        model.merge_adapter()
        assert torch.allclose(model(input_ids=ids(), decoder_input_ids=ids()).logits, expected, atol=1e-5)
