"""Bytes that autograd keeps for backward: LottaLoRA over PEFT's LoRA, same ranks, targets and trained modules.

Three models in one run: ours, PEFT's `LoraConfig`, and beta written the naive way (`beta * (W x) + ...`, which keeps
W x). Every saved storage is counted once; parameters are not counted.

    python benchmarks/perf/backward_bytes.py
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from shared import RANK, RESULTS, SCALES, environment, kept_for_backward, llama_config, write_json
from torch import nn
from transformers import LlamaForCausalLM

from hf_lottalora import LottaLoraConfig

TARGETS = {"all linear layers": "all-linear", "attention": ["q_proj", "k_proj", "v_proj", "o_proj"]}


def saved_bytes(model: nn.Module, batch: torch.Tensor, there: Iterable[torch.Tensor] = ()) -> int:
    """Bytes kept for backward by one forward pass, without what else is `there` anyway."""
    with kept_for_backward(model, there) as storages:
        model(input_ids=batch, labels=batch)
    return sum(storages.values())


class NaiveBeta(nn.Module):
    """PEFT's LoRA layer with beta as one would write it down."""

    def __init__(self, layer: Linear) -> None:
        super().__init__()
        self.layer = layer
        self.beta = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer = self.layer
        A, B = layer.lora_A["default"], layer.lora_B["default"]
        low_rank: torch.Tensor = B(A(x.to(A.weight.dtype))) * layer.scaling["default"]
        return (self.beta * layer.base_layer(x) + low_rank).to(x.dtype)


def build(kind: str, targets: Any, dtype: torch.dtype, trained: bool, scale: str) -> nn.Module:
    base = LlamaForCausalLM._from_config(llama_config(scale), dtype=dtype)
    if kind == "lottalora":
        state = "train" if trained else "frozen"
        config = LottaLoraConfig(seed=42, r=RANK, target_modules=targets, embeddings=state, norms=state)
        model = get_peft_model(base, config)
    else:
        model = get_peft_model(base, LoraConfig(r=RANK, target_modules=targets))
        for name, parameter in model.named_parameters():
            if trained and ("norm" in name or "embed_tokens" in name):
                parameter.requires_grad_(True)
        if kind == "naive beta":
            for path, layer in list(model.named_modules()):
                if isinstance(layer, Linear):
                    parent, _, name = path.rpartition(".")
                    setattr(model.get_submodule(parent), name, NaiveBeta(layer))
    if not trained:
        model.enable_input_require_grads()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default=RESULTS / "backward_bytes.json", help="JSON file to write")
    parser.add_argument("--scale", choices=SCALES, default="base", help="default: base")
    arguments = parser.parse_args()
    batch = torch.randint(0, 32_000, (4, 128), generator=torch.Generator().manual_seed(0))
    rows = []
    print("| targets | dtype | embeddings, norms | LottaLoRA MiB | PEFT LoRA MiB | ratio | naive beta ratio |")
    print("|---|---|---|---|---|---|---|")
    for label, targets in TARGETS.items():
        for dtype in (torch.float32, torch.bfloat16):
            for trained in (False, True):
                found = {
                    kind: saved_bytes(build(kind, targets, dtype, trained, arguments.scale), batch)
                    for kind in ("lottalora", "peft lora", "naive beta")
                }
                ratio, naive = (found[kind] / found["peft lora"] for kind in ("lottalora", "naive beta"))
                row = {"targets": label, "dtype": str(dtype).removeprefix("torch."), "trained": trained, **found}
                rows.append({**row, "ratio": ratio, "naive_ratio": naive})
                print(
                    f"| {label} | {row['dtype']} | {'trained' if trained else 'frozen'} "
                    f"| {found['lottalora'] / 2**20:.1f} | {found['peft lora'] / 2**20:.1f} "
                    f"| {ratio:.3f} | {naive:.3f} |"
                )
    write_json(
        arguments.output, {"environment": environment(), "scale": arguments.scale, "batch": [4, 128], "rows": rows}
    )


if __name__ == "__main__":
    main()
