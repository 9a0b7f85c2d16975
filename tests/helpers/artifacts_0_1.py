"""Artifacts that version 0.1 wrote, in the folder of this name: later versions must load them to the bit.

Run as a script this wrote them, with hf_lottalora 0.1.0: each with what it must come back as, in `expected.json`.
Never run it again to make a test pass. Those called `...@5.0` were made with transformers 5.0.0, the others with 5.23.0.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers as T
from torch import nn

FOLDER = Path(__file__).with_suffix("")

_SIZES = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 16,
}  # fmt: skip
_LLAMA = T.LlamaConfig(**_SIZES)
_TIED = T.LlamaConfig(**_SIZES, tie_word_embeddings=True)
_BERT = T.BertConfig(**_SIZES)
_BART = T.BartConfig(
    vocab_size=32, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=16,
)  # fmt: skip
_GPT2 = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
_VIT = T.ViTConfig(
    hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
)
LM, CLS, SEQ, IMG = (
    T.AutoModelForCausalLM,
    T.AutoModelForSequenceClassification,
    T.AutoModelForSeq2SeqLM,
    T.AutoModelForImageClassification,
)


class Case(NamedTuple):
    """What was built, with which options of `LottaLoraConfig`."""

    config: Any
    auto: Any
    options: dict[str, Any] = {}  # noqa: RUF012


CASES = {
    # One of each row of 0.1's table of attention projections.
    "llama": Case(_LLAMA, LM),
    "bert": Case(_BERT, CLS),
    "bart": Case(_BART, SEQ),
    "t5": Case(T.T5Config(vocab_size=32, d_model=16, d_ff=24, num_layers=1, num_heads=2, d_kv=8), SEQ),
    "albert": Case(T.AlbertConfig(**_SIZES, embedding_size=8), CLS),
    "bloom": Case(T.BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2), LM),
    "deberta": Case(T.DebertaConfig(**_SIZES), CLS),
    "deberta-v2": Case(T.DebertaV2Config(**_SIZES), CLS),
    "distilbert": Case(
        T.DistilBertConfig(vocab_size=32, dim=16, hidden_dim=24, n_layers=1, n_heads=2, max_position_embeddings=16), CLS
    ),
    "gpt2": Case(T.GPT2Config(**_GPT2, bos_token_id=1, eos_token_id=1), LM),
    "gpt_bigcode": Case(T.GPTBigCodeConfig(**_GPT2, bos_token_id=1, eos_token_id=1), LM),
    "gpt_neox": Case(T.GPTNeoXConfig(**_SIZES), LM),
    "modernbert": Case(T.ModernBertConfig(**_SIZES, pad_token_id=0, cls_token_id=1, sep_token_id=2), CLS),
    "mpt": Case(T.MptConfig(vocab_size=32, d_model=16, n_layers=1, n_heads=2, max_seq_len=16), LM),
    "phi": Case(T.PhiConfig(**_SIZES, pad_token_id=0), LM),
    "phi3": Case(T.Phi3Config(**_SIZES, pad_token_id=0), LM),
    "vit": Case(_VIT, IMG),
    # "all-linear", also where 0.1 left out what a mixer reads without calling it.
    "mamba-all-linear": Case(
        T.MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4, tie_word_embeddings=True), LM,
        {"target_modules": "all-linear"},
    ),
    "llama-all-linear": Case(_LLAMA, LM, {"target_modules": "all-linear"}),
    # Every redraw; tied and untied; DoRA; what else changes the tensors in a file.
    "llama-targets": Case(_LLAMA, LM, {"redraw": "targets"}),
    "llama-none": Case(_LLAMA, LM, {"redraw": "none"}),
    "llama-targets-kept": Case(_LLAMA, LM, {"redraw": "targets", "save_kept": True}),
    "llama-tied": Case(_TIED, LM),
    "llama-tied-lora": Case(_TIED, LM, {"embeddings": "lora", "r": 1}),
    "llama-tied-none": Case(_TIED, LM, {"redraw": "none", "embeddings": "frozen"}),
    "llama-dora": Case(_LLAMA, LM, {"use_dora": True, "lora_alpha": 4}),
    "llama-dora-inputs": Case(_LLAMA, LM, {"use_dora": True, "dora_magnitude": "inputs"}),
    "llama-layer-norm-residual": Case(_LLAMA, LM, {"layer_norm": True, "residual": True}),
    "llama-packed": Case(_LLAMA, LM, {"family": "binary", "residency": "packed"}),
    "llama-patterns": Case(
        _LLAMA, LM,
        {"family_pattern": {"mlp.*": "ternary"}, "seed_pattern": {"k_proj": 1}, "train_beta_pattern": {"v_proj": False},
         "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"o_proj": 2}},
    ),
    "bert-head-lora": Case(_BERT, CLS, {"head": "lora_bias", "biases": "train", "norms": "frozen", "use_rslora": True}),
    "bert-frozen-beta": Case(_BERT, CLS, {"train_beta": False, "modules_to_save": ["pooler"], "adapter_seed": 3}),
    "resnet": Case(
        T.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]), IMG, {"target_modules": ["convolution"]}
    ),
}  # fmt: skip


def base(name: str) -> nn.Module:
    """The base model, every parameter by a draw of its own: what a pretrained one would be."""
    from hf_lottalora import ScaffoldTensor

    model: nn.Module = CASES[name.partition("@")[0]].auto.from_config(CASES[name.partition("@")[0]].config)
    for path, parameter in model.named_parameters():
        drawn = ScaffoldTensor(path, tuple(parameter.shape), 7, "normal", 0.1).draw()
        parameter.data.copy_(drawn)
    return model.eval()


def fingerprint(model: nn.Module) -> dict[str, str]:
    """SHA-256 of every tensor that the model consists of: the base model's by their paths, the adapter's by its keys."""
    from peft import get_peft_model_state_dict

    plan = model.get_plan()  # type: ignore[operator]
    live = {path.replace(".base_layer", ""): value for path, value in model.get_base_model().state_dict().items()}  # type: ignore[operator]
    tensors = {tensor.path: live[tensor.path] for tensor in plan.tensors if tensor.path in live}
    tensors.update(get_peft_model_state_dict(model))
    tensors.pop("lottalora_manifest")
    return {
        key: hashlib.sha256(f"{value.dtype} {tuple(value.shape)} ".encode() + _bytes(value)).hexdigest()
        for key, value in sorted(tensors.items())
    }


def _bytes(value: torch.Tensor) -> bytes:
    dense = value.dense() if hasattr(value, "scaffold") else value
    return dense.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def batch(name: str) -> dict[str, torch.Tensor]:
    """What the outputs in `expected.json` were computed from."""
    case = CASES[name.partition("@")[0]]
    if case.auto is IMG:
        size = getattr(case.config, "image_size", 32)
        return {"pixel_values": torch.linspace(-1, 1, 3 * size * size).view(1, 3, size, size)}
    ids = torch.arange(3, 13).view(2, 5)
    return {"input_ids": ids, **({"decoder_input_ids": ids} if case.auto is SEQ else {})}


def main() -> None:
    """Write the artifacts named on the command line, or all of them."""
    from peft import get_peft_model

    from hf_lottalora import LottaLoraConfig

    for name in sys.argv[1:] or CASES:
        case = CASES[name.partition("@")[0]]
        settings = {"seed": 42, "r": 2, "init_lora_weights": False, **case.options}
        model = get_peft_model(base(name), LottaLoraConfig(**settings)).eval()
        for parameter in model.parameters():
            if parameter.requires_grad:  # as if trained
                parameter.data += torch.linspace(-0.1, 0.1, parameter.numel()).view(parameter.shape)
        model.save_pretrained(FOLDER / name)
        (FOLDER / name / "README.md").unlink()
        with torch.no_grad():
            output = model(**batch(name)).logits.double()
        expected = {"tensors": fingerprint(model), "output": output.flatten()[:32].tolist()}
        (FOLDER / name / "expected.json").write_text(json.dumps(expected, indent=0) + "\n")


if __name__ == "__main__":
    main()
