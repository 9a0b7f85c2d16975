"""MNIST with a multilayer perceptron: the paper's cheapest table (appendix B), reproduced on the real data.

The hidden layers are drawn from the seed and frozen; A, B and beta of each, and the linear head, are trained. Settings
are the paper's: AdamW, learning rate 1e-3, weight decay 1e-2, batch 128, 20 epochs, cosine; pixels normalised and
flattened; 54,000 images to train on, 6,000 to validate; ReLU, dropout 0.1. The accuracy is that of the last epoch on
the 10,000 test images: nothing is chosen by it, nor by the validation images. Methods:

- `lottalora`: `LottaLoraConfig(seed, r, lora_alpha)`, all else by default;
- `full`: every weight is trained, from torch's own initialisation.

The paper gives alpha = 1, which with its alpha / r would shrink what larger ranks add. Its figures fit a factor of 1 at
every rank, so `--alpha` takes both readings: `1` is the factor 1 / r, `r` the factor 1.

    python benchmarks/paper/mnist.py                                   # medium, r = 8, both alphas, and full training
    python benchmarks/paper/mnist.py --preset tiny small --r 1 2 4 8   # more of the table; finished runs are kept
    python benchmarks/paper/mnist.py --quick                           # seconds, to see that it runs
"""

from __future__ import annotations

import argparse
import gzip
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import hf_lottalora  # isort: skip  # first: it registers the method with PEFT
import numpy as np
import torch
from cli import RESULTS as FOLDER
from cli import new_parser, parse_common, results_so_far, run_jobs, seeds_of, write_json
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

WIDTHS = {
    "tiny": (128, 64),
    "small": (256, 128, 64),
    "medium": (512, 256, 128, 64),
    "large": (1024, 512, 256, 128, 64),
}
METHODS = ("lottalora", "full")
# Test accuracy in percent by method, preset and rank, as the paper gives it; large is one seed.
PAPER: dict[str, dict[str, dict[int, float]]] = {
    "full": {"tiny": {0: 98.06}, "small": {0: 98.37}, "medium": {0: 98.38}},
    "lottalora": {
        "tiny": {1: 85.06, 2: 90.60, 4: 93.56, 8: 95.41},
        "small": {1: 87.51, 8: 96.19},
        "medium": {1: 89.33, 2: 92.73, 4: 95.44, 8: 96.80, 16: 97.53, 32: 97.80},
        "large": {1: 92.08, 2: 94.83, 4: 96.70, 8: 97.37},
    },
}
VALIDATION_SHARE = 0.1
RESULTS = FOLDER / "mnist.json"


@dataclass
class Split:
    """Normalised images of shape (n, 784), and labels of shape (n,)."""

    x: Tensor
    y: Tensor

    def __getitem__(self, rows: Any) -> Split:
        return Split(self.x[rows], self.y[rows])


@dataclass(frozen=True)
class Cell:
    """One cell of the table. Full training has r = 0."""

    preset: str
    method: str
    r: int
    alpha: str

    @property
    def trainable(self) -> int:
        """The paper's count: r (d_in + d_out) + 1 for each hidden layer, or all of it, and the head."""
        widths = WIDTHS[self.preset]
        pairs = zip((784, *widths), widths, strict=False)
        hidden = sum(self.r * (i + o) + 1 if self.r else (i + 1) * o for i, o in pairs)
        return hidden + widths[-1] * 10 + 10


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


def load_data(args: argparse.Namespace) -> tuple[Split, Split]:
    """Training set and test set, each read once per process."""
    train, test = (_load_split(args.data_dir / "mnist", name, args.device) for name in ("train", "t10k"))
    return (train[:2000] if args.quick else train), test


@cache
def _load_split(folder: Path, name: str, device: str) -> Split:
    pixels, labels = (_read_idx(folder / f"{name}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
    x = torch.from_numpy(pixels.reshape(len(pixels), -1)).float().div_(255).sub_(0.1307).div_(0.3081)
    return Split(x.to(device), torch.from_numpy(labels).long().to(device))


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


def build_model(cell: Cell, seed: int, **options: Any) -> nn.Module:
    """The same network for every method; `seed` is the scaffold's, or that of torch's own initialisation.

    `options` change the `LottaLoraConfig`.
    """
    torch.manual_seed(seed)
    model = MLP(WIDTHS[cell.preset])
    if cell.method == "full":
        return model
    settings = {"r": cell.r, "lora_alpha": cell.r if cell.alpha == "r" else 1}
    return adapted(model, seed, **{**settings, **options})


def adapted(network: MLP, seed: int, **options: Any) -> nn.Module:
    """The network with adapters on its hidden layers, and its head trained; `options` are the `LottaLoraConfig`'s."""
    settings = {
        "seed": seed,
        "target_modules": [f"hidden.{i}" for i in range(len(network.hidden))],
        "modules_to_save": ["head"],
        "decay_beta": True,  # the paper's setting, read literally
    }
    return get_peft_model(network, hf_lottalora.LottaLoraConfig(**{**settings, **options}))


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    model.eval()
    return float((torch.cat([model(x) for x in split.x.split(2000)]).argmax(-1) == split.y).float().mean())


def without_scaffold(model: nn.Module, test: Split) -> dict[str, float]:
    """Test accuracy with the scaffold removed after training."""
    with model.scaffold_off():
        return {"test_accuracy_scaffold_off": round(accuracy(model, test), 6)}


def fit(
    model: nn.Module,
    train: Split,
    seed: int,
    args: argparse.Namespace,
    schedule: tuple[str, int] | None = None,
    weight_decay: float = 1e-2,
    lr: float = 1e-3,
) -> list[float]:
    """Train on 9 tenths of the images; the accuracy on the others after each epoch. See `run`."""
    resampler = hf_lottalora.ScaffoldResampler(model, *schedule) if schedule else None

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)

    shuffle = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(train.y), generator=shuffle)
    rows = round(VALIDATION_SHARE * len(order))
    validation, train = train[order[:rows]], train[order[rows:]]
    steps = -(-len(train.y) // args.batch_size) * args.epochs
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    undecayed = [p for name, p in trained if name.endswith("lora_beta.default.norm")]
    decayed = [p for name, p in trained if not name.endswith("lora_beta.default.norm")]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, foreach=True)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    curve = []
    for _ in tqdm(range(args.epochs), desc=f"seed {seed}", leave=False, unit="epoch", disable=args.workers > 1):
        model.train()
        if resampler:
            resampler.start_epoch()
        for batch in torch.randperm(len(train.y), generator=shuffle).split(args.batch_size):
            optimizer.zero_grad()
            if resampler:
                resampler.backward(loss_of, train.x[batch], train.y[batch])
            else:
                loss_of(train.x[batch], train.y[batch]).backward()
            optimizer.step()
            cosine.step()
        curve.append(round(accuracy(model, validation), 6))
    return curve


def run(
    cell: Cell,
    seed: int,
    args: argparse.Namespace,
    schedule: tuple[str, int] | None = None,
    options: dict[str, Any] | None = None,
    weight_decay: float = 1e-2,
) -> dict[str, Any]:
    """Train one model and score it.

    `schedule` and a number of scaffolds resample the scaffold on the way; `options` change the `LottaLoraConfig`.
    Everything trained is decayed, but beta with `decay_beta=False`.
    """
    torch.set_num_threads(args.threads)
    train, test = load_data(args)
    model = build_model(cell, seed, **(options or {})).to(args.device)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if trainable != cell.trainable and "head" not in (options or {}).get("target_modules", ()):
        raise RuntimeError(f"{cell}: {trainable} trainable parameters, expected {cell.trainable}.")
    start = time.perf_counter()
    curve = fit(model, train, seed, args, schedule, weight_decay)
    return {
        **vars(cell),
        "seed": seed,
        "test_accuracy": round(accuracy(model, test), 6),
        "validation_accuracy": curve,
        "trainable_parameters": trainable,
        **({} if cell.method == "full" else without_scaffold(model, test)),
        "betas": {} if cell.method == "full" else model.get_betas(),
        "seconds": round(time.perf_counter() - start, 1),
    }


def summarise(runs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per cell of the table, over the seeds there are."""
    cells: dict[Cell, list[dict[str, Any]]] = {}
    for found in runs.values():
        cells.setdefault(Cell(**{name: found[name] for name in Cell.__annotations__}), []).append(found)
    rows = []
    for cell in sorted(cells, key=lambda c: (list(WIDTHS).index(c.preset), METHODS.index(c.method), c.alpha, c.r)):
        scores = [100 * found["test_accuracy"] for found in cells[cell]]
        betas = [beta for found in cells[cell] for beta in found["betas"].values()]
        rows.append(
            {
                **vars(cell),
                "seeds": len(scores),
                "mean": mean(scores),
                "std": stdev(scores) if len(scores) > 1 else None,
                "paper": PAPER[cell.method].get(cell.preset, {}).get(cell.r),
                "trainable_parameters": cell.trainable,
                "beta_min": min(betas, default=None),
                "beta_median": median(betas) if betas else None,
                "seconds": mean(found["seconds"] for found in cells[cell]),
            }
        )
    return rows


def table(summary: list[dict[str, Any]]) -> str:
    """The summary as a Markdown table."""
    lines = [
        "| preset | method | alpha | r | trainable | test accuracy % | paper % | seeds | beta min / median | seconds |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in summary:
        score = f"{row['mean']:.2f}" + (f" ± {row['std']:.2f}" if row["std"] is not None else "")
        paper = f"{row['paper']:.2f}" if row["paper"] else ""
        beta = f"{row['beta_min']:.3f} / {row['beta_median']:.3f}" if row["r"] else ""
        what = f"{row['preset']} | `{row['method']}` | {row['alpha']} | {row['r'] or ''}"
        lines.append(
            f"| {what} | {row['trainable_parameters']:,} | {score} | {paper} | {row['seeds']} | {beta} "
            f"| {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--preset", nargs="+", choices=WIDTHS, default=["medium"], help="default: medium")
    add("--r", nargs="+", type=int, default=[8], help="ranks (default: 8)")
    add("--alpha", nargs="+", choices=["1", "r"], default=["1", "r"], help="default: both")
    add("--methods", nargs="+", choices=METHODS, default=METHODS, help="default: both")
    return parse_mnist(parser, RESULTS)


def parse_mnist(parser: argparse.ArgumentParser, results: Path, epochs: int = 20) -> argparse.Namespace:
    """Parse the command line of a benchmark on MNIST."""
    return parse_common(parser, results, epochs, "mnist/*-ubyte.gz", "2,000 images")


def main() -> None:
    args = parse_args()
    result = results_so_far(args)
    load_data(args)
    cells = []
    for preset in args.preset:
        if "lottalora" in args.methods:
            cells += [Cell(preset, "lottalora", r, alpha) for alpha in args.alpha for r in args.r]
        if "full" in args.methods:
            cells.append(Cell(preset, "full", 0, ""))
    jobs = {
        f"{cell.preset}/{cell.method}/r={cell.r}/alpha={cell.alpha}/seed={seed}": (cell, seed, args)
        for seed in seeds_of(args)
        for cell in cells
    }
    jobs = {key: job for key, job in jobs.items() if key not in result["runs"]}
    for key, found in run_jobs(run, jobs, args.workers):
        result["runs"][key] = found
        tqdm.write(f"{key}: {found['test_accuracy']:.2%}, {found['seconds']} s")
        result["summary"] = summarise(result["runs"])
        if args.recorded:
            write_json(args.output, result)
    print(table(summarise(result["runs"])))


if __name__ == "__main__":
    main()
