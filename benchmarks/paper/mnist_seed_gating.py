"""Seed gating (paper section 3, finding 4): one set of adapters, three scaffolds, and the seed says which task it does.

The medium network of `mnist.py` at r = 4 is trained over three scaffolds at once, each batch over the next one: seeds
42, 43 and 44 mean the digits {1, 2, 3}, {4, 5, 6} and {7, 8, 9}. Two ways:

- `own`: under each seed only its own digits are shown;
- `reject`: all digits are shown, and those of other seeds, as 0 always, are to be answered with an eleventh class;
  an epoch is one pass over the images, each under one of the three seeds in turn.

Reported per seed, on test images: share of own digits answered rightly, and for `reject` the share of the other digits
that is rejected. Learning rate, batch and the rest are those of `mnist.py`, with alpha = r.

    python benchmarks/paper/mnist_seed_gating.py            # 150 epochs each way, as the paper
    python benchmarks/paper/mnist_seed_gating.py --quick    # seconds, to see that it runs
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from cli import RESULTS as FOLDER
from cli import mean_and_std, new_parser, results_so_far, run_ways

import hf_lottalora  # isort: skip  # first: it registers the method with PEFT
import torch
from mnist import MLP, WIDTHS, Split, load_data, parse_mnist
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

RESULTS = FOLDER / "mnist_seed_gating.json"
DIGITS = {42: (1, 2, 3), 43: (4, 5, 6), 44: (7, 8, 9)}
OUT, RANK = 10, 4
PAPER = {"own": "97-99 % of own digits", "reject": "93-99 % of own digits, 95-99 % of the others rejected"}


def build_model(adapter_seed: int) -> nn.Module:
    """The medium network with eleven classes, over the scaffold of the first seed."""
    torch.manual_seed(adapter_seed)
    network = MLP(WIDTHS["medium"])
    network.head = nn.Linear(WIDTHS["medium"][-1], OUT + 1)
    config = hf_lottalora.LottaLoraConfig(
        seed=next(iter(DIGITS)),
        adapter_seed=adapter_seed,
        r=RANK,
        lora_alpha=RANK,
        target_modules=[f"hidden.{i}" for i in range(len(network.hidden))],
        modules_to_save=["head"],
    )
    return get_peft_model(network, config)


def labelled(split: Split, digits: tuple[int, ...], way: str) -> Split:
    """What is shown under one seed: its own digits, or all with the others as `OUT`."""
    own = torch.isin(split.y, torch.tensor(digits, device=split.y.device))
    return split[own] if way == "own" else Split(split.x, torch.where(own, split.y, OUT))


@torch.no_grad()
def scores(model: nn.Module, test: Split, digits: tuple[int, ...]) -> dict[str, float]:
    """Shares of own digits answered rightly, of others rejected, and of zeros rejected."""
    model.eval()
    answers = torch.cat([model(x) for x in test.x.split(2000)]).argmax(-1)
    own = torch.isin(test.y, torch.tensor(digits, device=test.y.device))
    return {
        "own_right": float((answers == test.y)[own].float().mean()),
        "others_rejected": float((answers == OUT)[~own].float().mean()),
        "zero_rejected": float((answers == OUT)[test.y == 0].float().mean()),
    }


def run(way: str, adapter_seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train one set of adapters over all seeds and score it under each."""
    torch.set_num_threads(args.threads)
    train, test = load_data(args)
    model = build_model(adapter_seed).to(args.device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    tasks = {seed: labelled(train, digits, way) for seed, digits in DIGITS.items()}
    rows_each = min(len(task.y) for task in tasks.values()) if way == "own" else len(train.y) // len(tasks)
    batches = rows_each // args.batch_size
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-2, foreach=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * batches * len(tasks))
    shuffle = torch.Generator().manual_seed(adapter_seed)
    start = time.perf_counter()
    for _ in tqdm(
        range(args.epochs), desc=f"{way}, seed {adapter_seed}", unit="epoch", leave=False, disable=args.workers > 1
    ):
        model.train()
        orders = {seed: torch.randperm(len(task.y), generator=shuffle) for seed, task in tasks.items()}
        for step in range(batches):
            for seed, task in tasks.items():
                model.set_scaffold_seed(seed)
                rows = orders[seed][step * args.batch_size : (step + 1) * args.batch_size]
                loss = F.cross_entropy(model(task.x[rows]), task.y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    found = {}
    for seed, digits in DIGITS.items():
        with model.scaffold_seed(seed):
            found[str(seed)] = scores(model, test, digits)
    return {
        "way": way,
        "adapter_seed": adapter_seed,
        "by_seed": found,
        "betas": model.get_betas(),
        "seconds": round(time.perf_counter() - start, 1),
    }


def table(runs: dict[str, dict[str, Any]]) -> str:
    """Means over the adapter seeds as a Markdown table."""
    lines = ["| way | seed | digits | own right % | others rejected % | zero rejected % | runs | paper |"]
    lines.append("|---|---|---|---:|---:|---:|---:|---|")
    for way in PAPER:
        found = [run["by_seed"] for run in runs.values() if run["way"] == way]
        for seed, digits in DIGITS.items():
            if found:
                keys = ("own_right", "others_rejected", "zero_rejected") if way == "reject" else ("own_right",)
                cells = [mean_and_std([100 * one[str(seed)][key] for one in found]) for key in keys]
                cells += [""] * (3 - len(cells))
                lines.append(f"| {way} | {seed} | {digits} | {' | '.join(cells)} | {len(found)} | {PAPER[way]} |")
    return "\n".join(lines)


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--ways", nargs="+", choices=PAPER, default=list(PAPER), help="default: both")
    args = parse_mnist(parser, RESULTS, epochs=150)
    result = results_so_far(args, preset="medium", r=RANK)
    load_data(args)
    run_ways(run, args, result, "by_seed")
    print(table(result["runs"]))


if __name__ == "__main__":
    main()
