"""Writes golden_draws.json. A draw that changes is a new scaffold format: never run this to make a test pass."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from hf_lottalora import ScaffoldTensor
from hf_lottalora.scaffold.draw import flat_bits

FILE = Path(__file__).with_name("golden_draws.json")
CASES = [
    (42, "layers.0.self_attn.q_proj.weight", (64, 64), "normal", 0.125, None, "float32"),
    (42, "layers.0.self_attn.q_proj.weight", (64, 64), "normal", 0.125, None, "bfloat16"),
    (42, "layers.0.self_attn.q_proj.weight", (64, 64), "normal", 0.125, None, "float16"),
    (42, "layers.0.self_attn.q_proj.weight", (64, 64), "normal", 0.125, None, "float64"),
    (0, "embeddings.word_embeddings.weight", (99, 32), "normal", 0.02, 0, "float32"),
    (2**64 - 1, "h.0.attn.c_attn.weight", (32, 96), "normal", 0.17677669529663687, None, "float32"),
    (7, "encoder.layer.0.output.dense.weight", (33, 7), "uniform", 0.3, None, "float32"),
    (7, "encoder.layer.0.output.dense.weight", (33, 7), "uniform", 0.3, None, "bfloat16"),
    (7, "layers.1.mlp.up_proj.weight", (31, 9), "binary", 1 / 3, None, "float32"),
    (7, "layers.1.mlp.up_proj.weight", (31, 9), "binary", 1 / 3, None, "bfloat16"),
    (7, "größe.weight", (1000, 1000), "normal", 1.0, None, "float32"),
    (7, "layers.1.mlp.up_proj.weight", (3, 5), "zero", 1.0, None, "float32"),
    (7, "layers.1.mlp.up_proj.weight", (31, 9), "normal_8bit", 0.5, None, "float32"),
    (7, "layers.1.mlp.up_proj.weight", (31, 9), "normal_4bit", 0.5, None, "bfloat16"),
    (7, "layers.1.mlp.up_proj.weight", (31, 9), "ternary", 0.5, None, "float32"),
    (7, "layers.1.mlp.up_proj.weight", (31, 9), "student_t", 0.5, None, "float32"),
]


def golden(
    seed: int, name: str, shape: tuple[int, ...], family: str, scale: float, zero_row: int | None, dtype: str
) -> dict[str, object]:
    scaffold = ScaffoldTensor(name, shape, seed, family, scale, zero_row)
    data = flat_bits(scaffold.draw(getattr(torch, dtype))).tobytes()
    return {
        "first_bytes": data[:32].hex(),
        "last_bytes": data[-16:].hex(),
        "blake2b": hashlib.blake2b(data, digest_size=16).hexdigest(),
        "digest": scaffold.digest(),
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps([{"case": case, **golden(*case)} for case in CASES], indent=1) + "\n")
