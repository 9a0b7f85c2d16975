"""One loader for each auto class of the transformers that is installed."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from make_auto_classes_stub import FILE, stub
from peft import get_peft_model
from tiny import SIZES, config, perturb
from torch import nn

import hf_lottalora
from hf_lottalora.artifact.loaders import LOADERS, loader_of

SMALL = {key: value for key, value in SIZES.items() if key != "vocab_size"}


def test_every_auto_class_has_one() -> None:
    autos = {
        name: auto for name, auto in vars(transformers.models.auto.modeling_auto).items() if name[:9] == "AutoModel"
    }
    assert {name.replace("AutoLottaLoraModel", "AutoModel"): auto for name, auto in LOADERS.items()} == autos
    assert len(LOADERS) >= 40
    for name, auto in LOADERS.items():
        ours = getattr(hf_lottalora, name)
        assert name in hf_lottalora.__all__ and name in dir(hf_lottalora)
        assert auto.__name__ in ours.__doc__ and ours._auto_class is auto
        assert pickle.loads(pickle.dumps(ours)) is ours and ours.__qualname__ == name
        with pytest.raises(OSError, match=rf"is made by {name}.from_pretrained\(path\)"):
            ours()
    assert len(set(hf_lottalora.__all__)) == len(hf_lottalora.__all__)
    assert all(hasattr(hf_lottalora, name) for name in hf_lottalora.__all__)


def test_the_stub_has_them_all() -> None:
    """With an older transformers it has more. Where one is missing, run make_auto_classes_stub.py."""
    assert set(stub().splitlines()) <= set(FILE.read_text().splitlines())


def test_a_class_that_transformers_does_not_have() -> None:
    with pytest.raises(ImportError, match="AutoLottaLoraModelForTelepathy"):
        from hf_lottalora import AutoLottaLoraModelForTelepathy  # type: ignore[attr-defined] # noqa: F401


@pytest.mark.parametrize(
    ("architecture", "class_name", "loader"),
    [
        ("LlamaConfig", "LlamaForCausalLM", "ForCausalLM"),
        ("GPT2Config", "GPT2LMHeadModel", "ForCausalLM"),  # also ForPreTraining
        ("BertConfig", "BertModel", ""),  # also ForTextEncoding
        ("BertConfig", "BertForPreTraining", "ForPreTraining"),
        ("BertConfig", "BertForMaskedLM", "ForMaskedLM"),
        ("BartConfig", "BartForConditionalGeneration", "ForSeq2SeqLM"),  # also ForMaskedLM
        ("T5Config", "T5EncoderModel", "ForTextEncoding"),
        ("WhisperConfig", "WhisperForConditionalGeneration", "ForSpeechSeq2Seq"),
        ("Gemma3Config", "Gemma3ForConditionalGeneration", "ForImageTextToText"),  # also ForCausalLM, ForMultimodalLM
        ("CLIPConfig", "CLIPModel", ""),  # also ForZeroShotImageClassification
        ("LayoutLMv2Config", "LayoutLMv2ForQuestionAnswering", "ForQuestionAnswering"),  # also ForDocument...
        ("GPT2Config", "GPT2DoubleHeadsModel", None),
    ],
)
def test_of_several_the_card_shows_the_closest(architecture: str, class_name: str, loader: str | None) -> None:
    expected = None if loader is None else f"AutoLottaLoraModel{loader}"
    assert loader_of(getattr(transformers, architecture)(), class_name) == expected


def masked_lm() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    settings = transformers.BertConfig(**SIZES, max_position_embeddings=40)
    return transformers.BertForMaskedLM(settings), {"input_ids": torch.arange(8).view(2, 4)}


def multiple_choice() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    settings = transformers.BertConfig(**SIZES, max_position_embeddings=40)
    return transformers.BertForMultipleChoice(settings), {"input_ids": torch.arange(24).view(2, 3, 4)}


def masked_image() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    settings = transformers.ViTConfig(**SMALL, image_size=8, patch_size=4, encoder_stride=4, num_channels=1)
    model = transformers.ViTForMaskedImageModeling(settings)
    return model, {"pixel_values": torch.ones(1, 1, 8, 8), "bool_masked_pos": torch.eye(4)[:1].bool()}


def audio() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    settings = transformers.ASTConfig(
        **SMALL, patch_size=4, frequency_stride=4, time_stride=4, max_length=8, num_mel_bins=8
    )
    return transformers.ASTForAudioClassification(settings), {"input_values": torch.ones(1, 8, 8)}


def speech() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    sides = {
        f"{side}_{what}": n
        for side in ("encoder", "decoder")
        for what, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))
    }
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    settings = transformers.WhisperConfig(
        vocab_size=99, d_model=32, num_mel_bins=8, max_source_positions=8, max_target_positions=9, **sides, **tokens
    )
    model = transformers.WhisperForConditionalGeneration(settings)
    return model, {"input_features": torch.ones(1, 8, 16), "decoder_input_ids": torch.arange(3)[None]}


def image_text() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    settings = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**SMALL, image_size=8, patch_size=4, projection_dim=32),
        text_config=transformers.LlamaConfig(**SIZES),
        image_token_id=98,
    )
    model = transformers.LlavaForConditionalGeneration(settings)
    ids = torch.tensor([[1, 98, 98, 98, 98, 5]])  # 4 patches
    return model, {"input_ids": ids, "pixel_values": torch.ones(1, 3, 8, 8)}


@pytest.mark.parametrize(
    ("loader", "build"),
    [
        ("ForMaskedLM", masked_lm),
        ("ForMultipleChoice", multiple_choice),
        ("ForMaskedImageModeling", masked_image),
        ("ForAudioClassification", audio),
        ("ForSpeechSeq2Seq", speech),
        ("ForImageTextToText", image_text),
    ],
)
def test_the_cards_lines_load_it_to_the_bit(
    tmp_path: Path, loader: str, build: Callable[[], tuple[nn.Module, dict[str, torch.Tensor]]]
) -> None:
    base, inputs = build()
    model = get_peft_model(base, config(target_modules="all-linear")).eval()
    perturb(model)
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert f"AutoLottaLoraModel{loader}.from_pretrained" in code
    scope: dict[str, Any] = {}
    exec(code.replace("path/to/this/folder", str(tmp_path)), scope)
    with torch.no_grad():
        assert torch.equal(scope["model"](**inputs)[0], model(**inputs)[0])
