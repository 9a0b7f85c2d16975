"""A model that does not fit: one training step of an 8B Llama in a few gigabytes, then saved and loaded.

Llama-3-8B's shapes (32 layers, d = 4,096, MLP 14,336, 8 key-value heads, vocabulary 128,256) in bfloat16, whose weights
alone take 16 GB. All matrices are streamed, embeddings and head adapted, r = 8. Reports seconds and peak memory.

    python benchmarks/perf/large.py                # minutes on two cores, below 8 GB
    python benchmarks/perf/large.py --layers 2     # to see that it runs
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from accelerate import init_empty_weights
from peft import get_peft_model
from shared import RANK, RESULTS, memory, record, seconds, training_step
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lottalora import AutoLottaLoraModelForCausalLM, LottaLoraConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--layers", type=int, default=32, help="default: 32")
    add("--tokens", type=int, default=128, help="default: 128")
    add("--family", default="binary", help="default: binary")
    add("--output", default=RESULTS / "large.json", help="JSON file; other settings in it are kept")
    args = parser.parse_args()
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4_096,
        intermediate_size=14_336,
        num_hidden_layers=args.layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8_192,
        rope_theta=500_000.0,
    )
    before, rows = memory("VmRSS"), []

    def report(what: str, duration: float) -> None:
        rows.append({"what": what, "seconds": duration, "peak_gib": (memory("VmHWM") - before) / 2**30})

    def build() -> None:
        nonlocal model
        with init_empty_weights(include_buffers=False):
            base = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
        options = {"embeddings": "lora", "head": "lora", "residency": "streamed", "family": args.family}
        model = get_peft_model(base, LottaLoraConfig(seed=42, r=RANK, target_modules="all-linear", **options))

    def reload() -> None:
        nonlocal model
        model = AutoLottaLoraModelForCausalLM.from_pretrained(folder)

    def probe() -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = model.eval()(input_ids=torch.arange(8)[None]).logits
        return logits

    model: torch.nn.Module
    report("build", seconds(build))
    parameters = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    report("training step", seconds(training_step(model, 1, args.tokens)))
    expected = probe()
    with tempfile.TemporaryDirectory() as folder:
        report("save", seconds(lambda: model.save_pretrained(folder)))
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        report("load", seconds(reload))
    if not torch.equal(probe(), expected):
        raise RuntimeError("The model that was loaded computes something else.")
    print(f"{parameters:,} parameters, {trained:,} trained, artifact {size / 2**20:.1f} MiB")
    key = f"{args.layers} layers, {args.family}, {args.tokens} tokens"
    record(args.output, key, rows, parameters=parameters, trained=trained, artifact_bytes=size)


if __name__ == "__main__":
    main()
