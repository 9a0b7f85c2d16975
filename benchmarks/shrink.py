"""Small models of every architecture that transformers knows, each shrunk from its default configuration.

What a size means is read off its key: widths become 64, heads 4, layers 2, a vocabulary 99 words. Nothing is said about
an architecture by name where a rule about keys does; `SPECIAL` holds the rest.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

WIDTH, HEADS, LAYERS, VOCABULARY, POSITIONS = 64, 4, 2, 99, 64
_MOST_VALUES = 2_000_000  # in the inputs of a part of a model; more takes minutes

# The task classes that are tried, in this order; the first one that an architecture has, builds and runs is its model.
TASKS = (
    "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "IMAGE_CLASSIFICATION", "SPEECH_SEQ_2_SEQ", "CTC",
    "AUDIO_CLASSIFICATION", "IMAGE_TEXT_TO_TEXT", "SEQUENCE_CLASSIFICATION", "VIDEO_CLASSIFICATION",
    "SEMANTIC_SEGMENTATION", "DEPTH_ESTIMATION", "OBJECT_DETECTION", "PRETRAINING", "",
)  # fmt: skip

# Key (the whole of it) -> value that replaces a larger integer.
RULES: tuple[tuple[str, int], ...] = (
    (r"codebook_size|audio_vocab_size|num_embeddings", 64),  # powers of two
    (r".*vocab_size.*|n_tokens", VOCABULARY),
    (r"rotary_dim|attention_window|(local_attention|sliding_window)\w*|(attention_)?chunk_size|context_size", 8),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 8),
    (r"mamba_d_head|mamba_head_dim|mamba_headdim", 16),
    (r"num_feat_extract_layers|vision_feature_layer|num_adapter_layers", 99),
    (r".*(max_\w*position|n_positions|max_seq|context_length|n_ctx|block_size|max_length).*", POSITIONS),
    (r".*(num_key_value_heads|num_kv_heads|kv_heads|num_key_value_groups)", 2),
    (r".*(attention_heads|num_heads|n_head|n_heads|attn_heads|num_query_heads)", HEADS),
    (r".*index_n_heads", 2),
    (r".*(head_dim|d_kv|dim_head|d_head|attention_head_size|kv_channels|key_head_dim|value_head_dim)", WIDTH // HEADS),
    (r".*(num_layers|hidden_layers|n_layers?|encoder_layers|decoder_layers|layers|_depth|depth|num_blocks)", LAYERS),
    (r".*(num_experts|n_routed_experts|num_local_experts|moe_num_experts)", 4),
    (r".*(num_experts_per_tok|top_k|topk|num_experts_per_token|moe_topk|moe_k)", 2),
    (r".*(n_group|topk_group|n_groups)", 1),
    (r".*(intermediate_size|ffn_dim|mlp_dim|d_ff|dff|feedforward_dim|ffn_hidden_size|d_inner|inner_dim)", 48),
    (r".*(lora_rank|rope_head_dim|nope_head_dim|d_rel)", 8),
    (r".*(hidden_size|d_model|n_embd|embedding_size|width|dim|proj_size|channels|_units)", WIDTH),
    (r".*(_size_per_layer_input|pooler_output_size)", WIDTH),
    (r".*(num_queries|num_latents|num_query_tokens|num_patterns|num_denoising)", 8),
)  # fmt: skip
KEEP = re.compile(
    r"(image|patch|window|pretrain_image|crop|kernel|chunk|stride|input|feature|sample|sampling|tubelet|batch|in_|"
    r"audio_|num_|number_|codebook_dim)\w*(size|channels|rate)$|num_channels|.*_token_id|.*token_index|in_channels|"
    r"in_chans|n_groups$|conv_groups|rope_dim"
)
# What cannot be read off keys, by model type.
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "bit": {"num_groups": 4},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "first_k_dense_replace": 1, "num_experts_per_tok": 2},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "layers_block_type": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hunyuan_vl_text": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "layoutlmv3": {"coordinate_size": 12, "shape_size": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 48},
    "ministral": {"head_dim": 16},
    "mobilebert": {"intra_bottleneck_size": 64, "true_hidden_size": 64},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32, "layers_block_type": ["mamba", "hybrid"]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
}


def shrunk_config(model_type: str) -> Any:
    """The default configuration of a model type, with every size made small.

    Raises:
        Exception: whatever the configuration class says of values that do not fit together.
    """
    config = AutoConfig.for_model(model_type)
    small = _shrunk(config.to_dict())
    small.update(copy.deepcopy(SPECIAL.get(model_type, {})))
    result = type(config).from_dict(small)
    if not hasattr(result, "pad_token_id"):  # transformers 5.0 left it out, where models ask for it
        result.pad_token_id = None
    return result


def _shrunk(values: dict[str, Any]) -> dict[str, Any]:
    result = {}
    for key, value in values.items():
        if key in ("out_features", "out_indices", "_out_features", "_out_indices", "stage_names", "per_layer_config"):
            continue  # layers that are no longer there
        if key in ("transformers_version", "model_type", "architectures", "dtype"):
            result[key] = value
        elif isinstance(value, dict):
            result[key] = _shrunk(value) if "model_type" in value or key.endswith("config") else _rope(value)
        else:
            result[key] = _smaller(key, value)
    return _consistent(result)


def _smaller(key: str, value: Any) -> Any:
    if isinstance(value, bool) or value is None or isinstance(value, (str, float)):
        return value
    if isinstance(value, int):
        if key.endswith(("token_id", "token_index")):
            return value if value < VOCABULARY else 3 + value % (VOCABULARY - 4)
        if KEEP.fullmatch(key):
            return value
        limit = next((limit for pattern, limit in RULES if re.fullmatch(pattern, key)), None)
        return value if limit is None else min(value, limit)
    if (
        isinstance(value, (list, tuple))
        and value
        and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    ):
        if re.fullmatch(
            r"depths?|num_layers|layers|num_encoder_blocks|num_blocks|stage_num_blocks|num_block_repeats", key
        ):
            return [min(v, 1) for v in value]
        if re.fullmatch(r".*(hidden_sizes|embed_dims?|dims|conv_dim|widths?|stage_channels)", key):
            return [min(v, 16 * 2 ** min(i, 2)) for i, v in enumerate(value)]
        if re.fullmatch(r".*(num_attention_heads|num_heads)", key):
            return [min(v, 2) for v in value]
    return list(value) if isinstance(value, tuple) else value


def _rope(values: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters, whose sections share half a head."""
    half = WIDTH // HEADS // 2
    share = values.get("partial_rotary_factor") or 1.0
    result = {key: _rope(value) if isinstance(value, dict) else value for key, value in values.items()}
    if isinstance(values.get("mrope_section"), list):
        whole = int(half * share)
        result["mrope_section"] = [whole - 2 * (whole // 4), whole // 4, whole // 4]
    return result


def _consistent(values: dict[str, Any]) -> dict[str, Any]:
    """Lists with an entry per layer as long as there are layers."""
    if "kv_lora_rank" in values and "num_attention_heads" in values:
        values["num_key_value_heads"] = values["num_attention_heads"]  # latent attention has no groups
    layers = next((values[k] for k in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") if k in values), None)
    per_layer = re.compile(r".*(layer_types|layers_block_type|no_rope_layers|layer_rope_theta|indexer_types)")
    for key, value in values.items():
        if per_layer.fullmatch(key) and isinstance(value, list) and isinstance(layers, int):
            kinds = [*dict.fromkeys(value), *value] if isinstance(value[0], str) else value  # one of each kind first
            values[key] = kinds[:layers]
    return values


def candidates(model_type: str) -> Iterator[Any]:
    """The model classes of a model type in the order of `TASKS`."""
    import transformers

    for task in TASKS:
        mapping = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES" if task else "MODEL_MAPPING_NAMES", {})
        names = mapping.get(model_type, ())
        for name in (names,) if isinstance(names, str) else names:
            found = getattr(transformers, name, None)
            if isinstance(found, type) and issubclass(found, nn.Module):
                yield found


def batches_of(model: Any, rows: int = 2, length: int = 8) -> Iterator[dict[str, torch.Tensor]]:
    """Random inputs that may fit, by the name of the model's main input, its signature and its configuration."""
    config, known = model.config, inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(0)
    vocabulary = min(VOCABULARY, _of(config, "vocab_size", VOCABULARY))
    size = _of(config, "image_size", 64)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    bins, frames = _of(config, "num_mel_bins", 80), 2 * _of(config, "max_source_positions", 64)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    ids = torch.randint(min(5, vocabulary - 1), vocabulary, (rows, length), generator=generator)
    decoder = {"decoder_input_ids": ids} if config.is_encoder_decoder and "decoder_input_ids" in known else {}
    images = {"pixel_values": randn(rows, _of(config, "num_channels", 3), height, width)}
    options: dict[str, list[dict[str, torch.Tensor]]] = {
        "input_ids": [{"input_ids": ids}, {"input_ids": ids, **images}],
        "pixel_values": [
            images,
            {"pixel_values": images["pixel_values"][..., :64, :64], "image_sizes": torch.tensor([[64, 64]] * rows)},
            {"input_ids": ids, **images},
            {"pixel_values": randn(rows, 8, _of(config, "num_channels", 3), height, width)},
        ],
        "pixel_values_videos": [{"pixel_values_videos": randn(rows, 8, 3, height, width)}],
        "input_values": [
            {"input_values": randn(rows, 4000)},
            {"input_values": randn(rows, _of(config, "max_length", 64), bins)},
            {"input_values": randn(rows, 1, 4000)},
        ],
        "input_features": [
            {"input_features": randn(rows, bins, frames)},
            {"input_features": randn(rows, frames, bins)},
            {"input_features": randn(rows, frames, bins), "input_features_mask": torch.ones(rows, frames).bool()},
            {"input_ids": ids, "input_features": randn(rows, 1, 64, 64)},
        ],
        "states": [
            {
                "states": randn(rows, length, _of(config, "state_dim", 17)),
                "actions": randn(rows, length, _of(config, "act_dim", 4)),
                "returns_to_go": randn(rows, length, 1),
                "timesteps": torch.arange(length).repeat(rows, 1),
                "attention_mask": torch.ones(rows, length),
            }
        ],
        "past_values": [{"past_values": randn(rows, _of(config, "context_length", 32), 1)}],
    }
    if "grid_thw" in known:  # pictures as rows of patches, four by four of them in each
        patch = _of(config, "patch_size", 16) ** 2 * _of(config, "temporal_patch_size", 1)
        name = next(iter(known))
        rows_of_patches = randn(rows * 16, patch * _of(config, "in_channels", _of(config, "num_channels", 3)))
        options[model.main_input_name] = [{name: rows_of_patches, "grid_thw": torch.tensor([[1, 4, 4]] * rows)}]
    for inputs in options.get(model.main_input_name, []):
        if inputs.keys() <= known.keys():
            yield inputs | decoder


def detours(model: Any, batch: dict[str, torch.Tensor]) -> Iterator[tuple[Any, dict[str, torch.Tensor]]]:
    """Calls that may reach what a batch leaves out, as (module, inputs): optional inputs, then parts by themselves.

    A vision or audio tower is called with pictures or sound of its own, which needs no processor that would mark their
    places among the words.
    """
    yield model, batch  # whose outputs may be more than the main one
    ids = batch.get("input_ids", batch.get("decoder_input_ids"))
    if ids is not None:
        width = _of(model.config, "hidden_size", _of(model.config, "d_model", WIDTH))
        generator = torch.Generator().manual_seed(1)
        optional = {
            "encoder_hidden_states": torch.randn(*ids.shape, width, generator=generator),
            "global_attention_mask": torch.eye(ids.shape[1], dtype=torch.int64)[:1].expand_as(ids),
            "labels": ids,
        }
        known = inspect.signature(model.forward).parameters
        yield from ((model, batch | {name: value}) for name, value in optional.items() if name in known)
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part is not model:
            for inputs in batches_of(part):
                if sum(value.numel() for value in inputs.values()) <= _MOST_VALUES:
                    yield part, inputs


def _of(config: Any, key: str, default: Any) -> Any:
    for part in (
        config,
        *(getattr(config, k, None) for k in ("text_config", "vision_config", "audio_config", "encoder", "decoder")),
    ):
        if isinstance(getattr(part, key, None), (int, list, tuple)):
            return getattr(part, key)
    return default


def tensors(output: Any) -> Iterator[torch.Tensor]:
    """All floating-point tensors in what a model returns."""
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, (dict, list, tuple)):
        for value in output.values() if isinstance(output, dict) else output:
            yield from tensors(value)


def main_output(output: Any) -> torch.Tensor:
    """The first floating-point tensor of more than one element in what a model returns, its loss left out."""
    for key, value in output.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel() > 1 and key != "loss":
            return value
    raise ValueError(f"no tensor among {list(output)}")


MODEL_TYPES = tuple(CONFIG_MAPPING_NAMES)
