"""MNIST with a multilayer perceptron: the paper's cheapest table (appendix B), reproduced on the real data.

The hidden layers are drawn from the seed and frozen; A, B and beta of each, and the linear head, are trained. Settings
are the paper's: AdamW, learning rate 1e-3, weight decay 1e-2, batch 128, 20 epochs, cosine; pixels normalised and
flattened; 54,000 images to train on, 6,000 to validate; ReLU, dropout 0.1, alpha = 1. The accuracy is that of the last
epoch on the 10,000 test images: nothing is chosen by it, nor by the validation images.

- `lottalora`: `LottaLoraConfig(seed, r, lora_alpha=1)`, all else by default;
- `zero`: the same over a scaffold of zeros ("scaffold off" in the paper);
- `full`: every weight is trained, from torch's own initialisation.

    python benchmarks/mnist.py                                   # medium, r = 8, three seeds, and full training
    python benchmarks/mnist.py --preset tiny small --r 1 2 4 8   # more of the table; finished runs are kept
    python benchmarks/mnist.py --quick                           # seconds, to see that it runs
"""

from __future__ import annotations

import argparse
import gzip
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import hf_lottalora  # isort: skip  # first: it registers the method with PEFT
import numpy as np
import torch
from peft import get_peft_model
from report import environment, read_json, write_json
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

WIDTHS = {
    "tiny": (128, 64),
    "small": (256, 128, 64),
    "medium": (512, 256, 128, 64),
    "large": (1024, 512, 256, 128, 64),
}
METHODS = ("lottalora", "zero", "full")
# (method, preset, r) -> test accuracy in percent, as the paper gives it.
PAPER_ACCURACY = {
    ("full", "tiny", 0): 98.06,
    ("full", "small", 0): 98.37,
    ("full", "medium", 0): 98.38,
    **{("lottalora", "tiny", r): a for r, a in {1: 85.06, 2: 90.60, 4: 93.56, 8: 95.41}.items()},
    **{("lottalora", "small", r): a for r, a in {1: 87.51, 8: 96.19}.items()},
    **{
        ("lottalora", "medium", r): a for r, a in {1: 89.33, 2: 92.73, 4: 95.44, 8: 96.80, 16: 97.53, 32: 97.80}.items()
    },
    **{("lottalora", "large", r): a for r, a in {1: 92.08, 2: 94.83, 4: 96.70, 8: 97.37}.items()},  # one seed
    **{("zero", "medium", r): a for r, a in {1: 82.9, 2: 91.0, 4: 94.5, 8: 96.3}.items()},
}
VALIDATION_ROWS, FIRST_SEED = 6000, 42
RESULTS = Path(__file__).parent / "results" / "mnist.json"


@dataclass
class Split:
    """Images of shape (n, 784), normalised, and labels of shape (n,)."""

    x: Tensor
    y: Tensor

    def __getitem__(self, rows: Any) -> Split:
        return Split(self.x[rows], self.y[rows])


class MLP(nn.Module):
    """Hidden layers with ReLU and dropout, and a linear head: (n, 784) -> (n, 10)."""

    def __init__(self, widths: tuple[int, ...], dropout: float = 0.1) -> None:
        super().__init__()
        sizes = zip((784, *widths), widths, strict=False)
        self.hidden = nn.ModuleList(nn.Linear(d_in, d_out) for d_in, d_out in sizes)
        self.head = nn.Linear(widths[-1], 10)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.hidden:
            x = self.dropout(F.relu(layer(x)))
        return self.head(x)


def load_split(folder: Path, name: str) -> Split:
    """Read one split from its two IDX files."""
    pixels, labels = (_read_idx(folder / f"{name}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
    x = torch.from_numpy(pixels.reshape(len(pixels), -1)).float().div_(255).sub_(0.1307).div_(0.3081)
    return Split(x, torch.from_numpy(labels).long())


def _read_idx(path: Path) -> np.ndarray:
    """IDX: two zero bytes, a type byte (8 = uint8), the number of dimensions, their sizes (big-endian), the data."""
    try:
        data = gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        raise SystemExit(f"{path} not found. Put MNIST's four .gz files there, or pass --data_dir.") from None
    if data[:3] != b"\0\0\x08":
        raise SystemExit(f"{path} is not an IDX file of bytes.")
    shape = np.frombuffer(data, ">u4", data[3], 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape).copy()


def build_model(method: str, preset: str, r: int, seed: int) -> nn.Module:
    """The same network for every method; `seed` is the scaffold's, or that of torch's own initialisation."""
    torch.manual_seed(seed)
    model = MLP(WIDTHS[preset])
    if method == "full":
        return model
    config = hf_lottalora.LottaLoraConfig(
        seed=seed,
        r=r,
        lora_alpha=1,
        family="zero" if method == "zero" else "normal",
        target_modules=[f"hidden.{i}" for i in range(len(model.hidden))],
        modules_to_save=["head"],
    )
    return get_peft_model(model, config)


def expected_trainable(method: str, preset: str, r: int) -> int:
    """The paper's count: r (d_in + d_out) + 1 for each hidden layer, or all of it, and the head."""
    widths = WIDTHS[preset]
    pairs = zip((784, *widths), widths, strict=False)
    hidden = sum((i + 1) * o if method == "full" else r * (i + o) + 1 for i, o in pairs)
    return hidden + widths[-1] * 10 + 10


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    model.eval()
    hits = sum(
        int((model(x).argmax(-1) == y).sum()) for x, y in zip(split.x.split(2000), split.y.split(2000), strict=True)
    )
    return hits / len(split.y)


def run(
    method: str, preset: str, r: int, seed: int, train: Split, test: Split, args: argparse.Namespace
) -> dict[str, Any]:
    """Train one model and score it."""
    model = build_model(method, preset, r, seed).to(args.device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    trainable = sum(p.numel() for p in parameters)
    if trainable != expected_trainable(method, preset, r):
        raise RuntimeError(f"{method} {preset} r={r}: {trainable} trainable parameters, not the paper's number.")

    shuffle = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(train.y), generator=shuffle)
    rows = VALIDATION_ROWS if len(order) > 2 * VALIDATION_ROWS else len(order) // 10
    validation, train = train[order[:rows]], train[order[rows:]]
    steps = -(-len(train.y) // args.batch_size) * args.epochs
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-2, foreach=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    curve = []
    start = time.perf_counter()
    for _ in tqdm(range(args.epochs), desc=f"{method} {preset} r={r} seed={seed}", leave=False, unit="epoch"):
        model.train()
        for batch in torch.randperm(len(train.y), generator=shuffle).split(args.batch_size):
            loss = F.cross_entropy(model(train.x[batch]), train.y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        curve.append(accuracy(model, validation))
    return {
        "test_accuracy": accuracy(model, test),
        "validation_accuracy": curve,
        "trainable_parameters": trainable,
        "betas": {} if method == "full" else model.get_betas(),
        "seconds": round(time.perf_counter() - start, 1),
    }


def summarise(runs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per cell of the table, over the seeds there are."""
    cells: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for key, found in runs.items():
        method, preset, rank, _ = key.split("/")
        cells.setdefault((method, preset, int(rank.removeprefix("r="))), []).append(found)
    rows = []
    for method, preset, r in sorted(cells, key=lambda c: (list(WIDTHS).index(c[1]), METHODS.index(c[0]), c[2])):
        found = cells[method, preset, r]
        scores = [100 * one["test_accuracy"] for one in found]
        betas = [beta for one in found for beta in one["betas"].values()]
        rows.append(
            {
                "method": method,
                "preset": preset,
                "r": r,
                "seeds": len(found),
                "mean": mean(scores),
                "std": stdev(scores) if len(scores) > 1 else None,
                "paper": PAPER_ACCURACY.get((method, preset, r)),
                "trainable_parameters": found[0]["trainable_parameters"],
                "beta_min": min(betas, default=None),
                "beta_median": median(betas) if betas else None,
                "seconds": mean(one["seconds"] for one in found),
            }
        )
    return rows


def table(summary: list[dict[str, Any]]) -> str:
    """The summary as a Markdown table."""

    def number(value: float | None, spec: str) -> str:
        return "" if value is None else format(value, spec)

    lines = [
        "| preset | method | r | trainable | test accuracy % | paper % | seeds | beta min / median | seconds |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in summary:
        spread = f" ± {row['std']:.2f}" if row["std"] is not None else ""
        beta = f"{row['beta_min']:.3f} / {row['beta_median']:.3f}" if row["beta_min"] is not None else ""
        lines.append(
            f"| {row['preset']} | `{row['method']}` | {row['r'] or ''} | {row['trainable_parameters']:,} "
            f"| {row['mean']:.2f}{spread} | {number(row['paper'], '.2f')} | {row['seeds']} | {beta} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    description, _, commands = (__doc__ or "").partition("    python")
    parser = argparse.ArgumentParser(
        description=description, epilog=f"    python{commands}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data_dir", type=Path, help="holds mnist/*-ubyte.gz (default: $LOTTALORA_DATA, or ../shared/data)")
    add("--output", type=Path, help=f"result file, also read to go on (default: results/{RESULTS.name})")
    add("--preset", nargs="+", choices=WIDTHS, default=["medium"], help="default: medium")
    add("--r", nargs="+", type=int, default=[8], help="ranks (default: 8)")
    add("--methods", nargs="+", choices=METHODS, default=["lottalora", "full"], help="default: lottalora full")
    add("--seeds", type=int, default=3, help=f"how many, from {FIRST_SEED} on (default: 3)")
    add("--epochs", type=int, default=20)
    add("--batch_size", type=int, default=128)
    add("--device", default="cpu")
    add("--threads", type=int, default=1, help="of torch; one is best for networks this small (default: 1)")
    add("--quick", action="store_true", help="smoke run: 6,000 images, one epoch, one seed, not recorded")
    args = parser.parse_args()
    args.data_dir = args.data_dir or Path(os.environ.get("LOTTALORA_DATA") or "../shared/data")
    if args.quick:
        args.seeds, args.epochs = 1, 1
    return args


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        args.output = args.output or (Path(scratch) / "mnist.json" if args.quick else RESULTS)
        settings = {"epochs": args.epochs, "batch_size": args.batch_size, "quick": args.quick}
        result = read_json(args.output) or {"settings": settings, "runs": {}}
        if result["settings"] != settings:
            raise SystemExit(
                f"{args.output} holds runs with other settings: {result['settings']}. Pass another --output."
            )
        result["environment"] = environment()
        train, test = (load_split(args.data_dir / "mnist", name) for name in ("train", "t10k"))
        if args.quick:
            train = train[:6000]
        train, test = (Split(split.x.to(args.device), split.y.to(args.device)) for split in (train, test))

        cells = [
            (method, preset, r)
            for preset in args.preset
            for method in args.methods
            for r in ([0] if method == "full" else args.r)
        ]
        for seed in range(FIRST_SEED, FIRST_SEED + args.seeds):
            for method, preset, r in cells:
                key = f"{method}/{preset}/r={r}/seed={seed}"
                if key not in result["runs"]:
                    found = result["runs"][key] = run(method, preset, r, seed, train, test, args)
                    tqdm.write(f"{key}: {found['test_accuracy']:.2%}, {found['seconds']} s")
                    result["summary"] = summarise(result["runs"])
                    write_json(args.output, result)
        print(table(summarise(result["runs"])))


if __name__ == "__main__":
    main()
