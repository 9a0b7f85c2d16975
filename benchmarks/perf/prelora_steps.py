"""Time of a step in PreLoRA's phases: full training, base and adapters, adapters alone; and over PEFT's LoRA.

Vision Transformers of several widths on random images, all linear layers of attention and MLP adapted with rank
width / 32 (the paper's 32 of 1,024), everything else trained, AdamW included, in float32. Each repeat runs all, every
second time in the other order; ratios are medians.

    python benchmarks/perf/prelora_steps.py
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from shared import RESULTS, kept_for_backward, paired, ratio, record
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from hf_lottalora import LottaLoraConfig
from hf_lottalora.experiments.prelora_trainer import inject, train_all_but

# Width: layers, heads, pixels of a patch of 32 x 32, images.
SIZES = {128: (4, 4, 8, 128), 384: (4, 6, 8, 64), 768: (2, 12, 8, 32)}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]


def network(width: int) -> ViTForImageClassification:
    layers, heads, patch, _ = SIZES[width]
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    return ViTForImageClassification(
        ViTConfig(**sizes, num_attention_heads=heads, image_size=32, patch_size=patch, num_labels=10)
    ).train()


def adapted(width: int, frozen: bool) -> nn.Module:
    """As PreLoRA leaves a model in its second phase, or in its third."""
    model = network(width)
    targets = [path for path, _ in model.named_modules() if path.rpartition(".")[2] in TARGETS]
    config = LottaLoraConfig(seed=42, redraw="none", train_beta=False, save_kept=True, target_modules=TARGETS)
    inject(model, config, dict.fromkeys(targets, width // 32))
    train_all_but(model, {f"{path}.{kind}" for path in targets for kind in ("weight", "bias")} if frozen else set())
    return model


def peft_lora(width: int) -> nn.Module:
    model = network(width)
    get_peft_model(model, LoraConfig(r=width // 32, lora_alpha=width // 32, target_modules=TARGETS))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("base_layer" not in name)
    return model


def training_step(model: nn.Module, images: int) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(0)
    batch = {"pixel_values": torch.randn(images, 3, 32, 32, generator=generator)}
    batch["labels"] = torch.randint(10, (images,), generator=generator)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, foreach=True)

    def step() -> None:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    return step


def kept(model: nn.Module, images: int) -> int:
    """Bytes of weights, gradients and moments, and of what one forward pass keeps."""
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    with kept_for_backward(model) as storages:
        model(pixel_values=torch.zeros(images, 3, 32, 32), labels=torch.zeros(images, dtype=torch.long))
    return sum(p.nbytes for p in model.parameters()) + 3 * trained + sum(storages.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--widths", nargs="+", type=int, choices=SIZES, default=list(SIZES), help="default: all")
    add("--repeats", type=int, default=11, help="default: 11")
    add("--output", default=RESULTS / "prelora_steps.json", help="JSON file; other widths in it are kept")
    args = parser.parse_args()
    for width in args.widths:
        torch.manual_seed(0)
        images = SIZES[width][3]
        models: dict[str, nn.Module] = {
            "full": network(width),
            "joint": adapted(width, frozen=False),
            "lora": adapted(width, frozen=True),
            "PEFT LoRA": peft_lora(width),
        }
        sizes = {name: kept(model, images) for name, model in models.items()}
        times = paired({name: training_step(model, images) for name, model in models.items()}, args.repeats)
        rows = []
        for name, model in models.items():
            parameters = list(model.parameters())
            share = sum(p.numel() for p in parameters if p.requires_grad) / sum(p.numel() for p in parameters)
            row: dict[str, Any] = {"phase": name, "trained %": 100 * share}
            row["milliseconds"] = 1e3 * statistics.median(times[name])
            row["time over full"] = ratio(times, name, "full")
            row["memory over full"] = sizes[name] / sizes["full"]
            rows.append(row)
        record(args.output, f"{width} wide, {images} images", rows, repeats=args.repeats)


if __name__ == "__main__":
    main()
