"""Every architecture the project names, tiny, from its config: one training step, save, load, merge."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers as T
from peft import PeftModel, get_peft_model
from tiny import SIZES, config, perturb
from torch import nn

from hf_lottalora import make_plan
from hf_lottalora.paths import owner_of

GQA = {**SIZES, "num_key_value_heads": 2}
SEQ2SEQ = {
    "vocab_size": 99, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
}  # fmt: skip
VISION = {key: SIZES[key] for key in SIZES if key != "vocab_size"} | {"image_size": 8, "patch_size": 4}


class Case(NamedTuple):
    config: Any
    auto: Any
    options: dict[str, Any] = {}  # noqa: RUF012


LM, CLS, SEQ, IMG = (
    T.AutoModelForCausalLM,
    T.AutoModelForSequenceClassification,
    T.AutoModelForSeq2SeqLM,
    T.AutoModelForImageClassification,
)
CASES = {
    "bert": Case(T.BertConfig(**SIZES), CLS),
    "roberta": Case(T.RobertaConfig(**SIZES), CLS),
    "distilbert": Case(
        T.DistilBertConfig(vocab_size=99, dim=32, hidden_dim=48, n_layers=2, n_heads=4, sinusoidal_pos_embds=True), CLS
    ),
    "deberta-v2": Case(
        T.DebertaV2Config(**SIZES, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8), CLS
    ),
    "electra": Case(T.ElectraConfig(**SIZES, embedding_size=16), CLS),
    "albert": Case(T.AlbertConfig(**SIZES, embedding_size=16), CLS),
    "modernbert": Case(T.ModernBertConfig(**SIZES, pad_token_id=0, cls_token_id=1, sep_token_id=2), CLS),
    "gpt2": Case(T.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4), LM),
    "gpt_neox": Case(T.GPTNeoXConfig(**SIZES), LM),
    "opt": Case(
        T.OPTConfig(
            vocab_size=99,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=32,
        ),
        LM,
    ),
    "bloom": Case(T.BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4), LM),
    "llama": Case(T.LlamaConfig(**GQA), LM),
    "mistral": Case(T.MistralConfig(**GQA), LM),
    "qwen2": Case(T.Qwen2Config(**GQA), LM),
    "qwen3": Case(T.Qwen3Config(**GQA, head_dim=8), LM),
    "gemma2": Case(T.Gemma2Config(**GQA, head_dim=8), LM),
    "gemma3": Case(T.Gemma3TextConfig(**GQA, head_dim=8), LM),
    "phi3": Case(T.Phi3Config(**SIZES, pad_token_id=0), LM),
    "mixtral": Case(T.MixtralConfig(**GQA, num_local_experts=4), LM),
    "mamba": Case(
        T.MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, state_size=4),
        LM,
        {"target_modules": "all-linear"},
    ),
    "t5": Case(T.T5Config(vocab_size=99, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8), SEQ),
    "bart": Case(T.BartConfig(**SEQ2SEQ), SEQ),
    "vit": Case(T.ViTConfig(**VISION), IMG),
    "deit": Case(T.DeiTConfig(**VISION, architectures=["DeiTForImageClassification"]), IMG),
    "swin": Case(
        T.SwinConfig(embed_dim=16, depths=[1, 1], num_heads=[2, 2], image_size=16, patch_size=2, window_size=2), IMG
    ),
    "convnext": Case(
        T.ConvNextConfig(hidden_sizes=[16, 32], depths=[1, 1], num_stages=2), IMG, {"target_modules": "all-linear"}
    ),
    "resnet": Case(
        T.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1]),
        IMG,
        {"target_modules": ["convolution"]},
    ),
    "clip": Case(
        T.CLIPConfig(
            text_config={**SIZES, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": 2},
            vision_config=VISION,
            projection_dim=16,
        ),
        T.AutoModel,
    ),
    "whisper": Case(
        T.WhisperConfig(
            **SEQ2SEQ,
            num_mel_bins=8,
            max_source_positions=10,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        ),
        T.AutoModelForSpeechSeq2Seq,
    ),
    "wav2vec2": Case(
        T.Wav2Vec2Config(
            **SIZES,
            conv_dim=(16, 16),
            conv_stride=(5, 2),
            conv_kernel=(10, 3),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=2,
            mask_time_prob=0.0,
            layerdrop=0.0,
        ),
        T.AutoModelForCTC,
    ),
    "decision_transformer": Case(
        T.DecisionTransformerConfig(state_dim=5, act_dim=3, hidden_size=32, n_layer=2, n_head=4, vocab_size=1),
        T.AutoModel,
    ),
}


def inputs(name: str, architecture: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 99, (2, 6), generator=generator)
    if name in ("vit", "deit", "swin", "convnext", "resnet"):
        size = getattr(architecture, "image_size", 32)
        size = size if isinstance(size, int) else 32
        return {"pixel_values": torch.randn(2, 3, size, size, generator=generator)}
    if name == "whisper":
        return {"input_features": torch.randn(2, 8, 20, generator=generator), "decoder_input_ids": ids}
    if name == "wav2vec2":
        return {"input_values": torch.randn(2, 400, generator=generator)}
    if name == "clip":
        ids[:, -1] = 1
        return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
    if name == "decision_transformer":
        return {
            "states": torch.randn(2, 4, 5, generator=generator),
            "actions": torch.randn(2, 4, 3, generator=generator),
            "returns_to_go": torch.randn(2, 4, 1, generator=generator),
            "timesteps": torch.arange(4).repeat(2, 1),
            "attention_mask": torch.ones(2, 4),
        }
    return {"input_ids": ids, **({"decoder_input_ids": ids} if name in ("t5", "bart") else {})}


def main_output(output: Any) -> torch.Tensor:
    for key in ("logits", "logits_per_image", "action_preds", "last_hidden_state"):
        if key in output:
            result: torch.Tensor = output[key]
            return result
    raise AssertionError(output.keys())


def build(name: str, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: nn.Module = CASES[name].auto.from_config(CASES[name].config)
    return model


@pytest.mark.filterwarnings("ignore")  # the libraries' own, about tiny shapes
@pytest.mark.parametrize("name", CASES)
def test_life_of_a_model(name: str, tmp_path: Path) -> None:
    settings = config(r=2, init_lora_weights=False, **CASES[name].options)
    first, second = build(name, 1), build(name, 2)
    own = {path: (tensor.clone(), second.state_dict()[path]) for path, tensor in first.state_dict().items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "(?s).*keep the values that")  # ours: something does not come from the seed
        model = get_peft_model(first, settings)

    # What the architecture itself makes constant is as it made it; what it makes random depends on our seed alone.
    plan = model.get_plan()
    for tensor in plan.with_role("kept"):
        before, other = own[tensor.path]
        if torch.equal(before, other):
            assert torch.equal(getattr(*owner_of(model.base_model.model, tensor.path)), before), tensor.path
    twin = get_peft_model(second, config(r=2, init_lora_weights=False, **CASES[name].options))
    states = model.state_dict(), twin.state_dict()
    assert [key for key in states[0] if not torch.equal(states[0][key], states[1][key])] == []

    batch = inputs(name, CASES[name].config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    main_output(model(**batch)).square().mean().backward()
    adapters = {n: p for n, p in model.named_parameters() if "lora_" in n and p.requires_grad}
    dead = [n for n, p in adapters.items() if p.grad is None]
    assert not dead, dead
    optimizer.step()
    model.verify_scaffold(full=True)

    perturb(model)
    model.eval()
    with torch.no_grad():
        expected = main_output(model(**batch))
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(build(name, 3), tmp_path).eval()
        assert torch.equal(main_output(again(**batch)), expected)
        merged = main_output(model.merge_and_unload()(**batch))
    torch.testing.assert_close(merged, expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("target", ["conv1d", "x_proj", "dt_proj", "out_proj"])
def test_an_adapter_that_the_architecture_would_bypass_is_refused(target: str) -> None:
    model = build("mamba", 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"matches 'backbone.layers.0.mixer.{target}', whose weight .* reads without"):
        get_peft_model(model, config(target_modules=[target]))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    plan = make_plan(model, config(target_modules="all-linear"))
    assert [adapter.path.rpartition(".")[2] for adapter in plan.adapters] == ["in_proj", "in_proj"]
