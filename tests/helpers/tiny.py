"""Small models that the tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from hf_lottalora import LottaLoraConfig

SIZES = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


# Kinds of adapters besides LoRA.
SOURCES: dict[str, dict[str, Any]] = {
    "randlora": {"adapter": "randlora"},
    "nola by shape": {"adapter": "nola", "bases": 7},
    "nola by layer": {"adapter": "nola", "bases": 7, "bases_shared": "layer"},
}


def llama_config(**changes: Any) -> LlamaConfig:
    special = {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaConfig(**{**SIZES, "tie_word_embeddings": True, **special, **changes})


def llama(**changes: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(llama_config(**changes))


def bert(**changes: Any) -> BertForSequenceClassification:
    return BertForSequenceClassification(BertConfig(**{**SIZES, "max_position_embeddings": 40, **changes}))


def gpt2(**changes: Any) -> GPT2LMHeadModel:
    sizes = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, "bos_token_id": 1, "eos_token_id": 1, **changes}))


def t5() -> T5ForConditionalGeneration:
    sizes = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))


def vit() -> ViTForImageClassification:
    sizes = {key: SIZES[key] for key in SIZES if key != "vocab_size"}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=1))


def mlp() -> nn.Sequential:
    """Layers "0" and "2" are hidden, "4" is the head."""
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


def config(**changes: Any) -> LottaLoraConfig:
    return LottaLoraConfig(**{"seed": 42, "r": 4, **changes})


def ids(rows: int = 2, length: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, 99, (rows, length), generator=generator)


def logits(model: nn.Module) -> torch.Tensor:
    """First output for `ids()` in eval mode: logits, or what else the task returns."""
    with torch.no_grad():
        result: torch.Tensor = model.eval()(ids())[0]
    return result


def perturb(model: nn.Module) -> None:
    """Give every trainable tensor a value that no initialisation has, as training would."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(0.1 * noise.to(parameter.dtype))
