"""What version 0.1 took for targets and heads, for its artifacts, which do not say. Never changed again."""

from __future__ import annotations

from dataclasses import replace

from .survey import Survey

_QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
_QKV_OUT = ["q_proj", "k_proj", "v_proj", "out_proj"]
_BERT = ["query", "key", "value", "attention.output.dense"]
_VISION = [*_BERT, *_QKVO]  # renamed from the first four to the last four in the course of transformers 5
_T5 = ["q", "k", "v", "o"]

# model_type -> module name suffixes. PEFT's own table stops at q and v, and lacks many of these architectures.
ATTENTION_PROJECTIONS: dict[str, list[str]] = {
    **dict.fromkeys(
        [
            "cohere", "deepseek_v3", "gemma", "gemma2", "gemma3", "gemma3_text", "glm", "granite", "llama", "mistral",
            "mixtral", "olmo", "olmo2", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "stablelm", "starcoder2",
        ],
        _QKVO,
    ),
    **dict.fromkeys(["bert", "roberta", "xlm-roberta", "electra", "camembert", "layoutlm"], _BERT),
    **dict.fromkeys(["bart", "mbart", "opt", "clip", "clip_text_model", "clip_vision_model", "whisper",
                     "wav2vec2", "hubert", "gpt_neo", "gptj", "marian", "pegasus", "m2m_100"], _QKV_OUT),
    **dict.fromkeys(["t5", "mt5", "umt5"], _T5),
    "albert": ["query", "key", "value", "attention.dense"],
    "bloom": ["query_key_value", "self_attention.dense"],
    "deberta": ["in_proj", "attention.output.dense"],
    "deberta-v2": ["query_proj", "key_proj", "value_proj", "attention.output.dense"],
    "distilbert": ["q_lin", "k_lin", "v_lin", "out_lin"],
    "falcon": ["query_key_value", "self_attention.dense"],
    "gpt2": ["attn.c_attn", "attn.c_proj"],
    "decision_transformer": ["attn.c_attn", "attn.c_proj"],
    "gpt_bigcode": ["attn.c_attn", "attn.c_proj"],
    "gpt_neox": ["query_key_value", "attention.dense"],
    "modernbert": ["attn.Wqkv", "attn.Wo"],
    "mpt": ["Wqkv", "attn.out_proj"],
    "phi": ["q_proj", "k_proj", "v_proj", "self_attn.dense"],
    "phi3": ["qkv_proj", "o_proj"],
    **dict.fromkeys(["deit", "dinov2", "swin", "swinv2", "vit"], _VISION),
}  # fmt: skip

_MAMBA = ("conv1d", "x_proj", "dt_proj", "out_proj")
_MAMBA2 = ("conv1d", "out_proj")

# model_type -> modules of its state-space mixer whose weight is read without calling them, always or by the fused
# kernels: an adapter there would do nothing.
WEIGHT_IS_READ: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(["mamba", "falcon_mamba"], _MAMBA),
    **dict.fromkeys(["bamba", "falcon_h1", "granitemoehybrid", "mamba2", "nemotron_h", "zamba2"], _MAMBA2),
    "jamba": ("conv1d", "dt_proj"),
    "zamba": ("conv1d",),
}


def with_heads_of_0_1(survey: Survey) -> Survey:
    """The survey as 0.1 made it, which knew the heads that transformers names alone."""

    def outside(path: str) -> bool:
        return path.startswith(tuple(f"{head}." for head in survey.inner_heads))

    tensors = (
        replace(
            t, in_head=t.in_head and not outside(t.path), tied_head=t.tied_head and not any(map(outside, t.aliases))
        )
        for t in survey.tensors
    )
    modules = (replace(m, in_head=m.in_head and not outside(f"{m.path}.")) for m in survey.modules)
    return replace(survey, tensors=tuple(tensors), modules=tuple(modules), inner_heads=())
