"""RandLoRA and NOLA: seconds of a step, bytes kept for backward, and files, beside PEFT's LoRA and RandLoRA.

A Llama of 4 layers, 256 wide, MLP 704, vocabulary 1,000 tied, adapters on all 28 linear layers, float32, AdamW. One
thread; the seconds are of its CPU time, in pairs, as medians of ratios; memory is the peak RSS of building and three
steps, in fresh processes. All backbones are kept as they are.

    python benchmarks/perf/sources.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from backward_bytes import saved_bytes
from peft import LoraConfig, RandLoraConfig, get_peft_model
from shared import RESULTS, in_fresh_process, memory, paired, ratio, record, training_step
from torch import nn
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lottalora import LottaLoraConfig, make_plan
from hf_lottalora.layers.nola import Nola
from hf_lottalora.layers.randlora import RandLora

SMALL = {
    "vocab_size": 1_000, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4,
    "tie_word_embeddings": True,
}  # fmt: skip
NOLA: dict[str, Any] = {"adapter": "nola", "bases": 256}
OURS: dict[str, dict[str, Any]] = {
    "LoRA, r = 8": {},
    "RandLoRA, r = 8": {"adapter": "randlora"},
    "RandLoRA, r = 32": {"adapter": "randlora", "r": 32},
    "NOLA, k = 256, shared": NOLA,
    "NOLA, k = 256, shared, 1 bit": {**NOLA, "basis_family": "binary"},
    "NOLA, k = 256, per layer": {**NOLA, "bases_shared": "layer"},
    "NOLA, k = 256, per layer, 1 bit": {**NOLA, "bases_shared": "layer", "basis_family": "binary"},
    "NOLA, k = 1,024, shared": {**NOLA, "bases": 1_024},
}
CLOCK = time.process_time
PEERS = ("PEFT LoRA, r = 8", "PEFT RandLoRA, r = 8", "PEFT RandLoRA, r = 32")
FROZEN: dict[str, Any] = {
    "seed": 42, "redraw": "none", "embeddings": "frozen", "norms": "frozen", "task_type": "CAUSAL_LM",
    "target_modules": "all-linear",
}  # fmt: skip
SHAPES = {
    "Llama-3.2-3B, q and v, RandLoRA r = 32": (
        {
            "hidden_size": 3_072, "intermediate_size": 8_192, "num_hidden_layers": 28, "num_attention_heads": 24,
            "num_key_value_heads": 8, "vocab_size": 128_256,
        },
        {"adapter": "randlora", "r": 32, "target_modules": ["q_proj", "v_proj"]},
    ),
    "LLaMA-2-70B, all 560 linears, NOLA k = 512, float16": (
        {
            "hidden_size": 8_192, "intermediate_size": 28_672, "num_hidden_layers": 80, "num_attention_heads": 64,
            "num_key_value_heads": 8,
        },
        {"adapter": "nola", "bases": 512, "save_dtype": "float16"},
    ),
}  # fmt: skip


def model_of(name: str, **changes: Any) -> nn.Module:
    """One of `OURS` or `PEERS` over the same weights."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SMALL))
    if name in OURS:
        return get_peft_model(base, LottaLoraConfig(**{"r": 8, **FROZEN, **OURS[name], **changes}))
    r, targets = int(name.rpartition(" ")[2]), {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    kind = RandLoraConfig if "RandLoRA" in name else LoraConfig
    return get_peft_model(base, kind(r=r, **targets, **changes))


def trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def held_by(model: nn.Module) -> list[torch.Tensor]:
    """What is there between steps: RandLoRA's bases, once for all layers, and NOLA's A and B, as LoRA has its own."""
    sources = [source for layer in model.modules() for source in getattr(layer, "sources", {}).values()]
    corners = [corner for source in sources if isinstance(source, RandLora) for corner in (source.small, source.large)]
    factors = [factors for source in sources if isinstance(source, Nola) for factors in (source.A, source.B)]
    made = [tensor for one in factors if one._made is not None for tensor in one._made.factors]
    return made + [tensor for corner in corners for tensor in corner._held.values()]


def steps(args: argparse.Namespace, rows: int, tokens: int) -> None:
    """Each of ours beside its peers, and no other model in memory."""
    batch = torch.randint(0, 1_000, (rows, tokens), generator=torch.Generator().manual_seed(0))
    table = []
    for name in tqdm(args.adapters, unit="adapter", desc=f"{rows} x {tokens}"):
        peer = next((peer for peer in PEERS[1:] if name.endswith(peer.removeprefix("PEFT "))), None)
        models = {one: model_of(one) for one in (PEERS[0], peer, name) if one}
        training = {one: training_step(model, rows, tokens, 1_000) for one, model in models.items()}
        times = paired(training, args.repeats, CLOCK)
        evaluating = paired({one: partial(evaluate, m, batch) for one, m in models.items()}, args.repeats, CLOCK)
        kept = {}
        for one, model in models.items():
            model.enable_input_require_grads()
            model(input_ids=batch)  # makes what is held
            kept[one] = saved_bytes(model, batch, (*model.buffers(), *held_by(model)))
        row: dict[str, Any] = {"adapter": name, "trained": trained(models[name])}
        row["milliseconds"] = 1e3 * statistics.median(times[name])
        row["step / PEFT LoRA"] = ratio(times, name, PEERS[0])
        row["step / PEFT RandLoRA"] = ratio(times, name, peer) if peer else ""
        row["evaluation / PEFT LoRA"] = ratio(evaluating, name, PEERS[0])
        row["kept / PEFT LoRA"] = kept[name] / kept[PEERS[0]]
        row["kept / PEFT RandLoRA"] = kept[name] / kept[peer] if peer else ""
        table.append(row)
    record(args.output, f"{rows} x {tokens} tokens", table, repeats=args.repeats)


@torch.no_grad()
def evaluate(model: nn.Module, batch: torch.Tensor) -> None:
    model(input_ids=batch, labels=batch)


def peak(name: str) -> float:
    """MiB that building and three steps of 4 x 128 tokens have added, in this process."""
    before = memory("VmRSS")
    step = training_step(model_of(name), 4, 128, 1_000)
    for _ in range(3):
        step()
    return (memory("VmHWM") - before) / 2**20


def memories(args: argparse.Namespace) -> None:
    table = []
    for name in (*PEERS[:2], *OURS):
        found = [in_fresh_process(__file__, "--worker", name) for _ in range(3)]
        table.append({"adapter": name, "peak MiB": statistics.median(found)})
    for row in table:
        row["over PEFT LoRA, MiB"] = row["peak MiB"] - table[0]["peak MiB"]
    record(args.output, "memory, 4 x 128 tokens", table, repeats=3)


def files(args: argparse.Namespace) -> None:
    table = []
    with tempfile.TemporaryDirectory() as folder:
        for name, changes in (
            *((name, {}) for name in (*OURS, *PEERS)),
            *((name, {"save_projection": False}) for name in PEERS[1:]),
        ):
            model = model_of(name, **changes)
            model.save_pretrained(folder)
            size = Path(folder, "adapter_model.safetensors").stat().st_size
            table.append(
                {"file": name + (", without bases" if changes else ""), "trained": trained(model), "bytes": size}
            )
    for name, (sizes, options) in SHAPES.items():
        with torch.device("meta"):
            base = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))
        plan = make_plan(base, LottaLoraConfig(**{"r": 8, **FROZEN, **options}))
        table.append({"file": f"{name}, planned", "trained": plan.adapter_parameters, "bytes": plan.artifact_bytes()})
    record(args.output, "files", table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", nargs="+", choices=["files", "memory", "steps"], default=["files", "memory", "steps"])
    add("--adapters", nargs="+", choices=OURS, default=list(OURS), help="for steps (default: all)")
    add("--sizes", nargs="+", default=["1x128", "4x128", "8x512"], help="ROWSxTOKENS (default: 1x128 4x128 8x512)")
    add("--repeats", type=int, default=15, help="default: 15")
    add("--worker", choices=(*PEERS, *OURS), help="used internally: peak memory of one in this process")
    add("--output", default=RESULTS / "sources.json", help="JSON file; other settings in it are kept")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.worker:
        print(json.dumps(peak(args.worker)))
        return
    if "files" in args.parts:
        files(args)
    if "memory" in args.parts:
        memories(args)
    for size in args.sizes if "steps" in args.parts else ():
        steps(args, *map(int, size.split("x")))


if __name__ == "__main__":
    main()
