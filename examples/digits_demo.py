"""Handwritten digits from a seed: train, save, and rebuild the model in a new process, in about a minute on a CPU.

A small Vision Transformer learns scikit-learn's 1,797 digits twice, with the same data, epochs, optimiser and schedule:

1. full training: every weight is trained;
2. LottaLoRA: every backbone weight is drawn from the seed and frozen; adapters on the attention projections, one beta
   for each, and the small rest (embeddings, norms, head) are trained.

The second model is saved as an artifact, which holds no frozen weight. A new process that is given nothing but the
artifact then rebuilds the model, and its outputs must be the same to the last bit.

    python examples/digits_demo.py
    python examples/digits_demo.py --r 4 --seed 7 --output_dir out/digits_r4
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read on import: nothing here needs the network

import hf_lottalora  # isort: skip  # first: it registers the method with PEFT
import matplotlib.pyplot as plt
import numpy as np
import torch
import transformers
from peft import get_peft_model
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTConfig, ViTForImageClassification

Curve = list[tuple[float, float]]  # epoch, test accuracy
SIZES = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
ARCHITECTURE = ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **SIZES)
OUTPUTS = {"artifact", "digits_demo.png", "summary.json"}


def load_data() -> tuple[TensorDataset, TensorDataset]:
    """1,437 digits to train on and 360 to test on: images of shape (1, 8, 8) in [-1, 1], labels 0 to 9."""
    pixels, labels = load_digits(return_X_y=True)
    images = (pixels / 8 - 1).astype(np.float32).reshape(-1, 1, 8, 8)
    parts = train_test_split(images, labels, test_size=360, random_state=0, stratify=labels)
    x_train, x_test, y_train, y_test = map(torch.from_numpy, parts)
    return TensorDataset(x_train, y_train), TensorDataset(x_test, y_test)


class Progress(TrainerCallback):
    """Keeps the learning curve, and prints ten lines of it."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.curve: Curve = []

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        self.curve.append((state.epoch, metrics["eval_accuracy"]))
        if round(state.epoch) % max(1, round(args.num_train_epochs / 10)) == 0:
            epoch = f"epoch {state.epoch:3.0f} of {args.num_train_epochs:.0f}"
            print(f"  {self.label:<14} {epoch}   test accuracy {metrics['eval_accuracy']:7.2%}", flush=True)


def train(model: nn.Module, label: str, data: tuple[TensorDataset, TensorDataset], args: argparse.Namespace) -> Curve:
    """Train with the Hugging Face Trainer; the same settings for both models."""
    progress = Progress(label)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=scratch,
                num_train_epochs=args.epochs,
                per_device_train_batch_size=32,
                per_device_eval_batch_size=360,
                learning_rate=args.learning_rate,
                weight_decay=0.01,
                lr_scheduler_type="cosine",
                warmup_steps=0.1,
                eval_strategy="epoch",
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                remove_unused_columns=False,
                dataloader_pin_memory=False,
                use_cpu=True,
                seed=args.seed,
            ),
            train_dataset=data[0],
            eval_dataset=data[1],
            data_collator=lambda rows: {
                "pixel_values": torch.stack([image for image, _ in rows]),
                "labels": torch.stack([label for _, label in rows]),
            },
            compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
            callbacks=[progress],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return progress.curve


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    model.eval()
    return model(pixel_values=images).logits


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def rebuild(artifact: Path, output: Path) -> None:
    """What the new process does: build the model from the artifact alone, and write its logits of the test images."""
    model = hf_lottalora.AutoLottaLoraModelForImageClassification.from_pretrained(artifact)
    _, test = load_data()
    np.save(output, logits(model, test.tensors[0]).numpy())


def rebuild_in_new_process(artifact: Path) -> np.ndarray:
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "logits.npy"
        subprocess.run([sys.executable, __file__, "--rebuild", str(artifact), str(output)], check=True)
        return np.load(output)


def check_output_dir(folder: Path) -> None:
    """Files of an earlier run are overwritten; a folder that holds anything else is left alone."""
    if folder.exists() and not folder.is_dir():
        raise SystemExit(f"{folder} is not a folder. Pass another --output_dir.")
    foreign = sorted({file.name for file in folder.iterdir()} - OUTPUTS) if folder.is_dir() else []
    if foreign:
        raise SystemExit(
            f"{folder} holds files that are not this demo's: {', '.join(foreign)}. Pass another --output_dir."
        )


def draw_figure(curves: dict[str, Curve], report: hf_lottalora.BetaReport, path: Path) -> None:
    """Learning curves on the left, each layer's betas on the right."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for (label, curve), colour in zip(curves.items(), ("#6b7280", "#c2410c"), strict=True):
        epochs, scores = zip(*curve, strict=True)
        left.plot(
            epochs, [100 * score for score in scores], color=colour, linewidth=2, label=f"{label}: {scores[-1]:.1%}"
        )
    left.set(xlabel="epoch", ylabel="test accuracy, %", xlim=(0, epochs[-1]), ylim=(0, 102))
    left.set_title("Digits: every weight trained, or LottaLoRA", loc="left")
    left.legend(frameon=False, loc="lower right", title="after the last epoch", alignment="left")

    report.plot(axes=right)
    left.grid(axis="y", alpha=0.25)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def table(summary: dict[str, Any]) -> str:
    full, lotta = summary["full"], summary["lottalora"]
    rows = [("", "full training", "LottaLoRA", "share")]
    for label, key, spec in (
        ("test accuracy", "test_accuracy", ".2%"),
        ("trained parameters", "trained_parameters", ","),
        ("saved model, bytes", "saved_bytes", ","),
        ("training, seconds", "seconds", ".1f"),
    ):
        share = f"{lotta[key] / full[key]:.1%}"
        rows.append((label, format(full[key], spec), format(lotta[key], spec), share))
    rows.append(("beta, smallest", "", f"{summary['beta']['min']:.3f}", ""))
    rows.append(("beta, median", "", f"{summary['beta']['median']:.3f}", ""))
    lines = [f"  {label:<20}{a:>15}{b:>15}{share:>10}".rstrip() for label, a, b, share in rows]
    return "\n".join([lines[0], "  " + "-" * 60, *lines[1:]])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("out/digits_demo"), help="default: out/digits_demo")
    add("--seed", type=int, default=42, help="the backbone, and the order of the training data (default: 42)")
    add("--r", type=int, default=8, help="rank of the adapters (default: 8)")
    add("--epochs", type=int, default=30, help="default: 30")
    add("--learning_rate", type=float, default=2e-3, help="default: 2e-3")
    add("--rebuild", nargs=2, type=Path, help=argparse.SUPPRESS)  # artifact, output: used for the new process
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    torch.set_num_threads(1)  # the model is too small for a second one to help
    plt.switch_backend("Agg")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    if args.rebuild:
        rebuild(*args.rebuild)
        return 0
    try:
        config = hf_lottalora.LottaLoraConfig(seed=args.seed, r=args.r)
    except ValueError as error:
        sys.exit(f"digits_demo.py: error: {error}")
    check_output_dir(args.output_dir)
    artifact = args.output_dir / "artifact"
    data = load_data()
    summary: dict[str, Any] = {name: getattr(args, name) for name in ("seed", "r", "epochs", "learning_rate")}
    summary["versions"] = {name: version(name) for name in ("hf-lottalora", "torch", "transformers", "peft")}
    curves: dict[str, Curve] = {}

    print("1. Training every weight, then only what LottaLoRA trains")
    for key, label in (("full", "full training"), ("lottalora", "LottaLoRA")):
        transformers.set_seed(args.seed)
        model: nn.Module = ViTForImageClassification(ARCHITECTURE)
        if key == "lottalora":
            model = get_peft_model(model, config)
        start = time.perf_counter()
        curves[label] = train(model, label, data, args)
        seconds = time.perf_counter() - start
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) if key == "full" else artifact
            model.save_pretrained(folder)
            summary[key] = {
                "test_accuracy": curves[label][-1][1],
                "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
                "saved_bytes": folder_bytes(folder),
                "seconds": seconds,
            }

    print(f"2. Rebuilding the LottaLoRA model in a new process, from {artifact} alone")
    report = hf_lottalora.beta_report(model)
    expected, found = logits(model, data[1].tensors[0]).numpy(), rebuild_in_new_process(artifact)
    same = expected.tobytes() == found.tobytes()
    summary["beta"] = {**report.summary, "all": {layer.path: layer.beta for layer in report.layers}}
    summary["rebuilt_bit_for_bit"] = same
    draw_figure(curves, report, args.output_dir / "digits_demo.png")
    (args.output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    if not same:
        print(
            f"FAILED: the rebuilt model's logits differ by up to {np.abs(expected - found).max():g}.", file=sys.stderr
        )
        return 1
    print(f"  the same {expected.size:,} logits of the {len(expected)} test images, bit for bit\n")
    print(table(summary))
    negative = report.summary["not_positive"]
    print(f"\n  {f'{negative} betas are not positive' if negative else 'every beta is positive'}")
    print(f"  figure: {args.output_dir / 'digits_demo.png'}\n  all figures: {args.output_dir / 'summary.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
