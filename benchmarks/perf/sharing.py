"""Saving an artifact and loading it again, and how much of that is spent on proving that it is what was saved.

A Llama with its embedding trained, in float32: at the default scale the artifact has 100 MB. One process, in pairs:

- `save`: `save_pretrained`, which compares the scaffold, hashes what it writes, and replaces the old artifact whole;
- `save, PEFT`: that of a LoRA model with the same tensors trained, over the same base;
- `load`: `AutoLottaLoraModelForCausalLM.from_pretrained`, which draws the scaffold;
- `load, PEFT`: `from_pretrained` of the dense base (safetensors) and `PeftModel.from_pretrained` over it;
- `hash`: SHA-256 of every tensor in the artifact's file, as `load` does it once.

    python benchmarks/perf/sharing.py
    python benchmarks/perf/sharing.py --scale 3M --repeats 3
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from shared import RESULTS, SCALES, build, llama_config, paired, ratio, record
from transformers import LlamaForCausalLM

from hf_lottalora import AutoLottaLoraModelForCausalLM
from hf_lottalora.artifact.digests import tensor_digests

PEERS = {"save": "save, PEFT", "load": "load, PEFT", "hash": "load"}


def lora(scale: str) -> PeftModel:
    config = LoraConfig(r=8, target_modules="all-linear", modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    return get_peft_model(LlamaForCausalLM(llama_config(scale)), config)


def hash_file(folder: Path) -> None:
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        tensor_digests(file.keys(), file.get_tensor)


def candidates(scale: str, folder: Path) -> dict[str, Callable[[], Any]]:
    ours, theirs = build("ours", scale, torch.float32, embeddings="train", norms="train"), lora(scale)
    LlamaForCausalLM(llama_config(scale)).save_pretrained(folder / "base")
    load = AutoLottaLoraModelForCausalLM.from_pretrained
    return {
        "save": lambda: ours.save_pretrained(folder / "ours"),
        "save, PEFT": lambda: theirs.save_pretrained(folder / "theirs"),
        "load": lambda: load(folder / "ours"),
        "load, PEFT": lambda: PeftModel.from_pretrained(
            LlamaForCausalLM.from_pretrained(folder / "base"), folder / "theirs"
        ),
        "hash": lambda: hash_file(folder / "ours"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="base", help="default: base, 110M parameters")
    parser.add_argument("--repeats", type=int, default=7, help="default: 7")
    parser.add_argument("--output", default=RESULTS / "sharing.json", help="JSON file; other scales in it are kept")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        times = paired(candidates(args.scale, Path(name)), args.repeats)
        sizes = {which: Path(name, which, "adapter_model.safetensors").stat().st_size for which in ("ours", "theirs")}
    rows = [
        {
            "what": what,
            "seconds": statistics.median(found),
            "over": PEERS.get(what, ""),
            "ratio": ratio(times, what, PEERS[what]) if what in PEERS else "",
        }
        for what, found in times.items()
    ]
    record(args.output, args.scale, rows, repeats=args.repeats, bytes=sizes)


if __name__ == "__main__":
    main()
