"""Counts and sizes of the paper's Llama scales (section 5), by building plans and by saving real artifacts.

Prints, for each of the 20 (scale, rank) cells, the trainable parameters in A, B and beta beside the paper's; and for
each scale the bytes of its artifact at r = 8 in float16 and int8, with embeddings trained, as in the paper, and with
`embeddings="lora"`, beside the paper's figure. The scaffold is streamed: 900M needs a gigabyte of memory.

    python benchmarks/paper/sizes.py
    python benchmarks/paper/sizes.py --scales 3M 30M
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from cli import RESULTS as FOLDER
from cli import environment, new_parser, write_json
from peft import get_peft_model
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lottalora import LottaLoraConfig, make_plan

RESULTS = FOLDER / "sizes.json"
RANKS = (1, 2, 4, 8)
# layers, hidden, heads, MLP; the paper's internal trainable parameters for r = 1, 2, 4, 8
SCALES: dict[str, tuple[int, int, int, int, tuple[int, ...]]] = {
    "3M": (6, 64, 4, 192, (3_096, 6_168, 12_312, 24_600)),
    "30M": (10, 384, 6, 1_024, (30_760, 61_480, 122_920, 245_800)),
    "300M": (22, 1_024, 16, 2_816, (180_312, 360_536, 720_984, 1_441_880)),
    "600M": (30, 1_344, 21, 3_584, (322_680, 645_240, 1_290_360, 2_580_600)),
    "900M": (34, 1_664, 26, 4_608, (452_744, 905_352, 1_810_568, 3_621_000)),
}
PAPER_MB = {"3M": 4, "30M": 24, "300M": 103, "600M": 105, "900M": 109}  # adapter and seed, r = 8
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


def hollow(scale: str) -> LlamaForCausalLM:
    """The model without values: nothing is allocated, up to 1.2e9 parameters."""
    with init_empty_weights(include_buffers=False):
        model = LlamaForCausalLM(architecture(scale))
    model.tie_weights()
    return model


def counts() -> list[dict[str, Any]]:
    """Trainable parameters in A, B and beta, ours and the paper's, of each scale and rank."""
    cells = []
    for scale, (*_, paper) in SCALES.items():
        model = hollow(scale)
        for r, expected in zip(RANKS, paper, strict=True):
            plan = make_plan(model, LottaLoraConfig(seed=42, r=r, lora_alpha=16))
            cells.append({"scale": scale, "r": r, "ours": plan.adapter_parameters, "paper": expected})
    return cells


def artifact(scale: str, embeddings: Any, save_dtype: Any) -> dict[str, Any]:
    """Save an artifact whose trained tensors have random values, and look at what is in it."""
    model = hollow(scale)
    full = 2 * model.num_parameters()
    config = LottaLoraConfig(
        seed=42, r=8, lora_alpha=16, embeddings=embeddings, save_dtype=save_dtype, residency="streamed"
    )
    peft_model = get_peft_model(model, config)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:  # else rows of embeddings are as drawn, and not stored
            torch.nn.init.normal_(parameter, std=0.02)
    with tempfile.TemporaryDirectory() as folder:
        peft_model.save_pretrained(folder)
        files = {file.name: file.stat().st_size for file in Path(folder).iterdir()}
        weights = Path(folder, "adapter_model.safetensors")
        with weights.open("rb") as opened:
            header = int.from_bytes(opened.read(8), "little")
        with safe_open(weights, framework="pt") as tensors:
            keys = list(tensors.keys())
            manifest = tensors.get_slice("lottalora_manifest").get_shape()[0]
    tied = [key for key in keys if key.endswith(("embed_tokens.weight", "lm_head.weight"))]
    return {
        "scale": scale,
        "embeddings": embeddings,
        "save_dtype": save_dtype,
        "weights_mib": files["adapter_model.safetensors"] / MIB,
        "planned_mib": peft_model.get_plan().artifact_bytes() / MIB,
        "header_mib": header / MIB,
        "manifest_mib": manifest / MIB,
        "folder_mib": sum(files.values()) / MIB,
        "full_checkpoint_mib": full / MIB,
        "paper_mb": PAPER_MB[scale],
        "copies_of_the_tied_matrix": len(tied),
    }


def table(artifacts: list[dict[str, Any]]) -> str:
    """Sizes of the weights by scale, as Markdown."""
    ways = [("train", "float16"), ("train", "int8"), ("lora", "float16"), ("lora", "int8")]
    found = {(one["scale"], one["embeddings"], one["save_dtype"]): one for one in artifacts}
    lines = [
        "| scale | all weights, float16 | paper: adapter and seed, MB | "
        + " | ".join(f"`embeddings={embeddings!r}`, {dtype}" for embeddings, dtype in ways)
        + " | of the last: header and manifest |",
        "|---|" + "---:|" * (3 + len(ways)),
    ]
    for scale in dict.fromkeys(one["scale"] for one in artifacts):
        of = [found[scale, *way] for way in ways]
        sizes = " | ".join(f"{one['weights_mib']:.2f}" for one in of)
        text = of[-1]["header_mib"] + of[-1]["manifest_mib"]
        lines.append(f"| {scale} | {of[0]['full_checkpoint_mib']:,.0f} | {PAPER_MB[scale]} | {sizes} | {text:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--scales", nargs="+", default=list(SCALES), choices=SCALES, help="whose artifacts are saved")
    parser.add_argument("--output", default=RESULTS, help="JSON file to write")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    cells = counts()
    artifacts = [
        artifact(scale, embeddings, save_dtype)
        for scale in arguments.scales
        for embeddings in ("train", "lora")
        for save_dtype in ("float16", "int8")
    ]
    write_json(arguments.output, {"environment": environment(), "counts": cells, "artifacts": artifacts})

    print("| scale | " + " | ".join(f"r={r}" for r in RANKS) + " | equal to the paper |\n|---|---|---|---|---|---|")
    for scale in SCALES:
        row = [cell for cell in cells if cell["scale"] == scale]
        equal = all(cell["ours"] == cell["paper"] for cell in row)
        print(f"| {scale} | " + " | ".join(f"{cell['ours']:,}" for cell in row) + f" | {'yes' if equal else 'NO'} |")
    print(f"\nMiB of `adapter_model.safetensors`, r = 8:\n\n{table(artifacts)}")


if __name__ == "__main__":
    main()
