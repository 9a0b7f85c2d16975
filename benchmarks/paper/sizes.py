"""Counts and sizes of the paper's Llama scales (section 5), by building plans and by saving a real artifact.

Prints, for each of the 20 (scale, rank) cells, the trainable parameters in A, B and beta beside the paper's, and for
one scale the bytes of its artifact with everything in float16, with embeddings trained and with `embeddings="lora"`.

    python benchmarks/paper/sizes.py
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from cli import RESULTS, environment, write_json
from peft import get_peft_model
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lottalora import LottaLoraConfig, make_plan

RANKS = (1, 2, 4, 8)
# layers, hidden, heads, MLP; the paper's internal trainable parameters for r = 1, 2, 4, 8
SCALES: dict[str, tuple[int, int, int, int, tuple[int, ...]]] = {
    "3M": (6, 64, 4, 192, (3_096, 6_168, 12_312, 24_600)),
    "30M": (10, 384, 6, 1_024, (30_760, 61_480, 122_920, 245_800)),
    "300M": (22, 1_024, 16, 2_816, (180_312, 360_536, 720_984, 1_441_880)),
    "600M": (30, 1_344, 21, 3_584, (322_680, 645_240, 1_290_360, 2_580_600)),
    "900M": (34, 1_664, 26, 4_608, (452_744, 905_352, 1_810_568, 3_621_000)),
}
MIB = 2**20


def architecture(scale: str) -> LlamaConfig:
    """The Llama of one of the paper's scales: vocabulary 32,000, tied embeddings."""
    layers, hidden, heads, ffn, _ = SCALES[scale]
    return LlamaConfig(
        vocab_size=32_000,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        tie_word_embeddings=True,
    )


def counts() -> list[dict[str, Any]]:
    cells = []
    for scale, (*_, paper) in SCALES.items():
        with init_empty_weights(include_buffers=False):  # nothing is allocated, up to 1.2e9 parameters
            model = LlamaForCausalLM(architecture(scale))
        model.tie_weights()
        for r, expected in zip(RANKS, paper, strict=True):
            plan = make_plan(model, LottaLoraConfig(seed=42, r=r, lora_alpha=16))
            cells.append({"scale": scale, "r": r, "ours": plan.adapter_parameters, "paper": expected})
    return cells


def artifact(scale: str, embeddings: str) -> dict[str, Any]:
    """Save a float16 artifact and look at what is in it."""
    model = LlamaForCausalLM(architecture(scale)).half()
    config = LottaLoraConfig(seed=42, r=8, lora_alpha=16, embeddings=embeddings)
    peft_model = get_peft_model(model, config, autocast_adapter_dtype=False)
    with tempfile.TemporaryDirectory() as folder:
        peft_model.save_pretrained(folder)
        files = {file.name: file.stat().st_size for file in Path(folder).iterdir()}
        with safe_open(Path(folder) / "adapter_model.safetensors", framework="pt") as weights:
            keys = list(weights.keys())
            dtypes = {str(weights.get_tensor(key).dtype) for key in keys if "manifest" not in key}
    tied = [key for key in keys if key.endswith(("embed_tokens.weight", "lm_head.weight"))]
    full = sum(p.numel() * p.element_size() for p in LlamaForCausalLM(architecture(scale)).half().parameters())
    return {
        "scale": scale,
        "embeddings": embeddings,
        "weights_mib": files["adapter_model.safetensors"] / MIB,
        "folder_mib": sum(files.values()) / MIB,
        "full_checkpoint_mib": full / MIB,
        "copies_of_the_tied_matrix": len(tied),
        "dtypes": sorted(dtypes),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", default="30M", choices=SCALES, help="scale whose artifact is saved")
    parser.add_argument("--output", default=RESULTS / "sizes.json", help="JSON file to write")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    cells = counts()
    artifacts = [artifact(arguments.scale, embeddings) for embeddings in ("train", "lora")]
    write_json(arguments.output, {"environment": environment(), "counts": cells, "artifacts": artifacts})

    print("| scale | " + " | ".join(f"r={r}" for r in RANKS) + " | equal to the paper |\n|---|---|---|---|---|---|")
    for scale in SCALES:
        row = [cell for cell in cells if cell["scale"] == scale]
        equal = all(cell["ours"] == cell["paper"] for cell in row)
        print(f"| {scale} | " + " | ".join(f"{cell['ours']:,}" for cell in row) + f" | {'yes' if equal else 'NO'} |")
    print("\n| artifact | weights MiB | whole folder MiB | full checkpoint MiB | tied matrix |\n|---|---|---|---|---|")
    for entry in artifacts:
        print(
            f"| {entry['scale']}, float16, embeddings={entry['embeddings']!r} | {entry['weights_mib']:.3f} "
            f"| {entry['folder_mib']:.3f} | {entry['full_checkpoint_mib']:.1f} "
            f"| {entry['copies_of_the_tied_matrix']} times |"
        )


if __name__ == "__main__":
    main()
