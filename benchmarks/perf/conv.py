"""Time of a training step of a convolutional network: LottaLoRA over PEFT's LoRA and over training every weight.

Plain-20 (`cifar10.py`) on batches of 128 random images of CIFAR's size, AdamW included; LoRA on every convolution,
batch norms and head trained in all. Each repeat runs all, every second time in the other order; ratios are medians.

    python benchmarks/perf/conv.py
"""

from __future__ import annotations

import argparse
import statistics
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from shared import RESULTS, paired, ratio, record
from torch import nn
from torch.nn import functional as F

from hf_lottalora import LottaLoraConfig

from cifar10 import plain20  # isort: skip  # found by `shared`

RANKS = (1, 16)


def named_network() -> nn.Sequential:
    """Plain-20 with names of which none ends another: PEFT's modules_to_save goes by endings."""
    return nn.Sequential(OrderedDict((f"layer{int(name):02}", module) for name, module in plain20().named_children()))


def models() -> dict[str, nn.Module]:
    network = named_network()
    convolutions = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)]
    others = [name for name, module in network.named_modules() if isinstance(module, (nn.BatchNorm2d, nn.Linear))]
    found: dict[str, nn.Module] = {"full": network}
    for rank in RANKS:
        options: dict[str, Any] = {"r": rank, "lora_alpha": rank, "target_modules": convolutions}
        options["modules_to_save"] = others
        found[f"PEFT LoRA, r={rank}"] = get_peft_model(named_network(), LoraConfig(**options))
        found[f"ours, r={rank}"] = get_peft_model(named_network(), LottaLoraConfig(seed=42, **options))
        dora = {"use_dora": True, "dora_magnitude": "inputs"}
        ours = LottaLoraConfig(seed=42, **options, **dora)
        found[f"ours, DoRA by input, r={rank}"] = get_peft_model(named_network(), ours)
    return found


def training_step(model: nn.Module, batch: int, dtype: torch.dtype) -> Callable[[], None]:
    """One step under autocast to `dtype`."""
    model = model.train().to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, 32, 32, generator=generator).contiguous(memory_format=torch.channels_last)
    y = torch.randint(10, (batch,), generator=generator)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, foreach=True)

    def step() -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(model(x).float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--batch", type=int, default=128, help="default: 128")
    add("--dtypes", nargs="+", default=["float32", "bfloat16"], help="default: both")
    add("--repeats", type=int, default=11, help="default: 11")
    add("--output", default=RESULTS / "conv.json", help="JSON file; other settings in it are kept")
    args = parser.parse_args()
    for dtype in args.dtypes:
        steps = {name: training_step(model, args.batch, getattr(torch, dtype)) for name, model in models().items()}
        times = paired(steps, args.repeats)
        rows = []
        for name, found in times.items():
            row: dict[str, Any] = {"model": name, "milliseconds": 1e3 * statistics.median(found)}
            row["over full"] = ratio(times, name, "full")
            rank = name.rpartition(", ")[2]
            row["over PEFT LoRA"] = "" if name == "full" else ratio(times, name, f"PEFT LoRA, {rank}")
            rows.append(row)
        key = f"{dtype}/{args.batch} images"
        record(args.output, key, rows, repeats=args.repeats)


if __name__ == "__main__":
    main()
