"""For `fuzz.py`: what can be wrong with a JSON file, as a change of its content or of its text."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from random import Random
from typing import Any

OTHERS: dict[str, list[Any]] = {
    "family": ["binary", "uniform", "ternary", "zero"],
    "scale": ["kaiming", "xavier", "initializer_range"],
    "redraw": ["all", "targets", "none"],
    "embeddings": ["train", "frozen", "lora"],
    "norms": ["frozen"],
    "biases": ["frozen", "train"],
    "bias": ["all", "lora_only"],
    "residency": ["packed", "streamed", "int4"],
    "dora_magnitude": ["inputs"],
    "save_dtype": ["float16", "bfloat16", "int8"],
    "task_type": ["CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION", "no such"],
    "peft_type": ["LORA", "LOHA", "no such"],
    "hidden_act": ["relu", "gelu", "gelu_new", "silu", "tanh", "no such"],
    "model_type": ["gpt2", "mistral", "bert", "no such"],
    "dtype": ["float16", "bfloat16", "float64", "no such"],
    "layer_type": ["basic", "bottleneck"],
}

# Keys by file that are known to decide something, or that code of others acts on. EVIL: the folder has such a module.
EVIL = "evil.Evil"
CHOSEN: dict[str, list[tuple[str, Any]]] = {
    "config.json": [
        ("hidden_act", "relu"), ("hidden_act", "tanh"), ("hidden_act", "no such"), ("rms_norm_eps", 0.5),
        ("layer_norm_eps", 0.5), ("rope_theta", 2.0), ("rope_parameters", {"rope_theta": 2.0, "rope_type": "default"}),
        ("rope_parameters", {"rope_type": "no such"}), ("rope_parameters", None),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0}), ("is_decoder", True), ("attention_bias", True),
        ("add_cross_attention", True), ("is_encoder_decoder", True), ("num_hidden_layers", 10**7),
        ("num_hidden_layers", 0), ("num_hidden_layers", -1), ("num_hidden_layers", 3), ("vocab_size", 10**9),
        ("vocab_size", 0), ("hidden_size", 10**9), ("intermediate_size", 10**9), ("depths", [10**6, 1]),
        ("hidden_sizes", [4, 10**8]), ("max_position_embeddings", 10**10), ("num_attention_heads", 0),
        ("num_attention_heads", 4), ("num_key_value_heads", 1), ("head_dim", 4), ("model_type", "gpt2"),
        ("model_type", "mistral"), ("architectures", ["GPT2LMHeadModel"]), ("architectures", "LlamaForCausalLM"),
        ("architectures", [None]), ("architectures", []), ("auto_map", {"AutoConfig": EVIL}),
        ("auto_map", {"AutoConfig": EVIL, "AutoModel": EVIL, "AutoModelForCausalLM": EVIL}),
        ("auto_map", {"AutoModelForCausalLM": "someone/repository--" + EVIL}), ("trust_remote_code", True),
        ("attn_implementation", "flash_attention_2"), ("_attn_implementation", "eager"),
        ("_attn_implementation", "someone/kernel"), ("attn_implementation", "no such"), ("dtype", "float16"),
        ("dtype", "bfloat16"), ("dtype", "no such"), ("torch_dtype", "float64"), ("tie_word_embeddings", True),
        ("tie_word_embeddings", False), ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
        ("pruned_heads", {"0": [0]}), ("_name_or_path", "/etc/passwd"), ("num_labels", 10**8), ("num_labels", 3),
        ("id2label", {"0": "a", "1": "b", "2": "c"}), ("id2label", {"0": "a", "1": "b"}), ("problem_type", "no such"),
        ("return_dict", False), ("use_cache", False), ("output_hidden_states", True), ("transformers_version", "4.0.0"),
        ("gradient_checkpointing", True), ("torchscript", True), ("chunk_size_feed_forward", 1), ("pad_token_id", 99),
        ("initializer_range", 0.5), ("initializer_range", -1), ("hidden_dropout_prob", 0.9), ("attention_dropout", 0.9),
    ],
    "adapter_config.json": [
        ("auto_mapping", {"base_model_class": "Evil", "parent_library": "evil"}), ("peft_type", "LORA"),
        ("base_model_name_or_path", "../../no such"), ("base_model_name_or_path", "someone/model"),
        ("revision", "other"), ("lora_dropout", 0.5), ("lora_dropout", 1.5), ("r", 10**7), ("r", 0), ("r", 3),
        ("target_modules", "("), ("target_modules", "(.*.*)*x"), ("target_modules", "all-linear"),
        ("target_modules", []), ("exclude_modules", "(.*.*)*x"), ("exclude_modules", "(a|aa)+$"),
        ("rank_pattern", {"(.*.*)*x": 1}), ("rank_pattern", {"(": 1}), ("alpha_pattern", {"q_proj": 50}),
        ("seed_pattern", {"(.*.*)*x": 1}), ("seed_pattern", {"q_proj": 1}), ("family_pattern", {"q_proj": "binary"}),
        ("train_beta_pattern", {"q_proj": False}), ("inference_mode", False), ("residency", "packed"),
        ("residency", "streamed"), ("save_dtype", "int8"), ("save_dtype", "int4"), ("init_lora_weights", False), ("init_lora_weights", "no such"),
        ("layers_to_transform", [0]), ("layers_pattern", "layers"), ("scale", 1e300), ("scale", 0.3), ("scale", -1.0),
        ("seed", 43), ("seed", 10**30), ("adapter_seed", 3), ("format_version", 2), ("format_version", None),
        ("use_dora", True), ("use_dora", False), ("use_rslora", True), ("lora_alpha", 99), ("lora_alpha", 10**400),
        ("train_beta", False), ("decay_beta", True), ("layer_norm", True), ("residual", True), ("save_kept", True),
        ("modules_to_save", ["lm_head"]), ("modules_to_save", ["no such"]), ("trainable_token_indices", [0]),
        ("trainable_token_indices", [10**9]), ("bias", "all"), ("fan_in_fan_out", True), ("resolved_targets", []),
        ("resolved_targets", None), ("scaffold_digests", None), ("scaffold_digests", {}), ("kept_digests", None),
        ("padding_rows", None), ("padding_rows", {"no such": 1}), ("other_dtypes", {"no such": "float16"}),
        ("other_dtypes", {"model.norm.weight": "float16"}), ("other_dtypes", {"lm_head.weight": "no such"}),
        ("other_dtypes", {"lm_head.weight": "load"}), ("runtime_config", {"ephemeral_gpu_offload": True}),
        ("megatron_config", {}), ("loftq_config", {"loftq_bits": 4}), ("lottalora_version", "9.9"),
        ("peft_version", "0.1"), ("task_type", "SEQ_CLS"), ("task_type", None), ("task_type", "TOKEN_CLS"),
    ],
}  # fmt: skip

Path = tuple[str, ...]


def paths(content: dict[str, Any], prefix: Path = ()) -> list[Path]:
    """Each key of a dictionary and of those in it."""
    found = []
    for key, value in content.items():
        found.append((*prefix, key))
        if isinstance(value, dict):
            found += paths(value, (*prefix, key))
    return found


def pick(rng: Random, content: dict[str, Any]) -> Path:
    """One of them; a dictionary of many keys does not push the others aside."""
    key = rng.choice(list(content))
    value = content[key]
    return (key, *pick(rng, value)) if isinstance(value, dict) and value and rng.random() < 0.7 else (key,)


def at(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """The dictionary that the last key is in."""
    for key in path[:-1]:
        content = content[key]
    return content


def same_type(rng: Random, key: str, value: Any) -> Any:
    """Another value of the same type; for None one that somebody could have set."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice([value + 1, value - 1, 0, -1, value * 2, 10**9])
    if isinstance(value, float):
        return rng.choice([value * 2, value + 0.5, 0.0, -1.0, 1e30])
    if isinstance(value, str):
        digit = "".join("0" if c != "0" else "1" for c in value[:1]) + value[1:]
        return rng.choice(OTHERS.get(key) or [value + "x", "", value.upper() + " ", digit])
    if isinstance(value, list):
        return rng.choice([value[1:], value[::-1], [*value, *(value[:1] or ["x"])], []])
    if isinstance(value, dict):
        return rng.choice([{}, {**value, "x": 1}, dict(list(value.items())[1:])])
    return rng.choice([True, 1, 0.5, "x", ["x"], {"x": 1}])


def other_type(rng: Random, value: Any) -> Any:
    """A value of another type of JSON."""
    everything = [None, True, 7, 0.5, "x", str(value), [], [value], {}, {"x": value}, [[]], "null"]
    return rng.choice([one for one in everything if type(one) is not type(value)])


def _delete(rng: Random, content: dict[str, Any]) -> str:
    path = pick(rng, content)
    del at(content, path)[path[-1]]
    return f"{'.'.join(path)} deleted"


def _set(rng: Random, content: dict[str, Any], other: bool) -> str:
    path = pick(rng, content)
    place, key = at(content, path), path[-1]
    was = place[key]
    place[key] = other_type(rng, was) if other else same_type(rng, key, was)
    return f"{'.'.join(path)}: {was!r} -> {place[key]!r}"


def _misspell(rng: Random, content: dict[str, Any]) -> str:
    path = pick(rng, content)
    place, key = at(content, path), path[-1]
    wrong = rng.choice([key + "s", key.upper(), key[:-1], " " + key, key.replace("_", "-") + "_"])
    items = [(wrong if name == key else name, value) for name, value in place.items()]
    place.clear()
    place.update(items)
    return f"{'.'.join(path)} -> {wrong!r}"


def _add(rng: Random, content: dict[str, Any]) -> str:
    key = rng.choice(["x", "__class__", "_plan", "self", "kwargs", "to_dict", "config", "state_dict", "subfolder"])
    content[key] = rng.choice([1, "x", None, {"x": []}])
    return f"{key} = {content[key]!r} added"


def _huge(rng: Random, content: dict[str, Any]) -> str:
    numbers = [path for path in paths(content) if isinstance(at(content, path)[path[-1]], (int, float))]
    path = rng.choice(numbers or [pick(rng, content)])
    place, key = at(content, path), path[-1]
    place[key] = rng.choice([2**31, 2**63, 2**64, 10**30, -(2**63), 1e308, 10**400, float("inf"), float("nan")])
    return f"{'.'.join(path)} -> {str(place[key])[:40]}"


# Changes of the content; each says what it did.
EDITS: dict[str, Callable[[Random, dict[str, Any]], str]] = {
    "key deleted": _delete,
    "same type": lambda rng, content: _set(rng, content, other=False),
    "other type": lambda rng, content: _set(rng, content, other=True),
    "misspelt key": _misspell,
    "added key": _add,
    "huge number": _huge,
}


def edited(rng: Random, what: str, text: str) -> tuple[str, str]:
    """The text after one of `EDITS`, which changes something, and what that was."""
    before = json.loads(text)
    while True:
        content = copy.deepcopy(before)
        said = EDITS[what](rng, content)
        if json.dumps(content) != json.dumps(before):
            return json.dumps(content, indent=2), said


def duplicated(rng: Random, text: str) -> tuple[bytes, str]:
    """A key twice, with two values."""
    content = json.loads(text)
    key = rng.choice(list(content))
    pair = f"{json.dumps(key)}: {json.dumps(rng.choice([same_type, lambda r, k, v: other_type(r, v)])(rng, key, content[key]))}"
    body = json.dumps(content)
    first = rng.random() < 0.5
    found = f"{{{pair}, {body[1:]}" if first else f"{body[:-1]}, {pair}}}"
    return found.encode(), f"{pair[:80]} {'before' if first else 'after'} the other"


def nested(rng: Random, text: str) -> tuple[bytes, str]:
    """A value that lies a hundred thousand brackets deep."""
    content = json.loads(text)
    key = rng.choice(["x", *content])
    content.pop(key, None)
    deep = rng.choice(["[" * 100_000 + "]" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000])
    return f"{json.dumps(content)[:-1]}, {json.dumps(key)}: {deep}}}".encode(), f"{key}: {deep[:5]}..."


def bytes_of(rng: Random, text: str) -> tuple[bytes, str]:
    """Text that is no JSON object, or not in UTF-8."""
    data = text.encode()
    place = rng.randrange(1, len(data) - 1)
    found: dict[str, bytes] = {
        "byte order mark": b"\xef\xbb\xbf" + data,
        "UTF-16": text.encode("utf-16"),
        "a byte that is not UTF-8": data[:place] + b"\xff" + data[place:],
        "a NUL": data[:place] + b"\0" + data[place:],
        "truncated": data[:place],
        "empty": b"",
        "blank": b" \n",
        "garbage after it": data + b"{}",
        "a list": b"[" + data + b"]",
        "a string": json.dumps(text).encode(),
        "null": b"null",
        "a number": b"3",
        "no object": b"[]",
        "an empty object": b"{}",
        "a comment": b"// settings\n" + data,
        "bits": bytes([*data[:place], data[place] ^ 1 << rng.randrange(8), *data[place + 1 :]]),
    }
    what = rng.choice(list(found))
    return found[what], f"{what} (at {place})"
