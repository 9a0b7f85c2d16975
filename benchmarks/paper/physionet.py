"""Intensive-care mortality (PhysioNet 2012, set A) with a closed-form continuous-time network (paper section 6).

`ncps`' CfC with 256 units and a backbone of 2 x 64, over 48 hours: 41 variables, each with its last value so far, and
as many masks that say whether it was measured in that hour. Values are clipped to the 1st and 99th percentile of the
training records and normalised; before the first measurement they are 0, the mean. The last state is read out by a
linear layer. The six linear layers of the cell (91,264 weights) are drawn and adapted; biases and read-out are trained.
Ways:

- `full`: every weight is trained, from the architecture's own initialisation;
- `r=1`, ...: `LottaLoraConfig` with that rank, alpha = r;
- `r=1 zero`: the same over a scaffold of zeros, with A and B starting at random (otherwise nothing would pass).

The paper's settings: AdamW, learning rate 2e-3, times 0.9 each epoch, weight decay 4e-6, batch 128, weight 11.69 on
deaths, and 800 of the 4,000 records to score. 400 of the other 3,200 choose the epoch, because full training overfits
within a few; the area under the ROC curve at the last epoch is given beside it. 50 epochs by default, when the learning
rate is 0.5 % of the first; the paper's are 100.

    pip install ncps                                # also in hf-lottalora[dev]
    python benchmarks/paper/physionet.py --workers 2      # 20 minutes on two cores
    python benchmarks/paper/physionet.py --quick          # seconds, to see that it runs

Finished runs are kept, so it can be interrupted and repeated.
"""

from __future__ import annotations

import argparse
import time
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import hf_lottalora  # isort: skip  # first: it registers the method with PEFT
import numpy as np
import pyarrow.parquet
import torch
from cli import RESULTS as FOLDER
from cli import mean_and_std, new_parser, parse_common, results_so_far, run_ways
from peft import get_peft_model
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "r=1": {"r": 1},
    "r=2": {"r": 2},
    "r=4": {"r": 4},
    "r=8": {"r": 8},
    "r=1 zero": {"r": 1, "family": "zero", "init_lora_weights": False},
}
DEFAULT = ("full", "r=1", "r=1 zero")
PAPER = {"full": 0.836, "r=1": 0.832, "r=2": 0.835, "r=4": 0.834, "r=8": 0.833}
TRAINABLE = {"full": 92_930, "r=1": 3_482, "r=2": 5_292, "r=4": 8_912, "r=8": 16_152}  # the paper's counts
HOURS, TEST_RECORDS, VALIDATION_RECORDS = 48, 800, 400
RESULTS = FOLDER / "physionet.json"


class Network(nn.Module):
    """A CfC over (n, 48, 82), its last state read out: (n, 2)."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        try:
            from ncps.torch import CfC
        except ModuleNotFoundError:
            raise SystemExit("This benchmark needs ncps: pip install ncps") from None
        self.cfc = CfC(inputs, 256, proj_size=2, return_sequences=False, backbone_units=64, backbone_layers=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.cfc(x)[0]


def build_model(way: str, seed: int, inputs: int) -> nn.Module:
    torch.manual_seed(seed)
    network = Network(inputs)
    if way == "full":
        return network
    layers = [name for name, module in network.named_modules() if isinstance(module, nn.Linear) and "rnn_cell" in name]
    options = {"target_modules": layers, "modules_to_save": ["cfc.fc"], "lora_alpha": WAYS[way]["r"], "biases": "train"}
    return get_peft_model(network, hf_lottalora.LottaLoraConfig(seed=seed, **options, **WAYS[way]))


@cache
def load_data(folder: Path) -> tuple[Tensor, Tensor]:
    """Inputs of shape (records, 48, 82), values and masks, and deaths of shape (records,), in a shuffled order.

    The first are to score, then come those to validate with, then those to train on.
    """
    folder = folder / "physionet2012"
    if not (folder / "set-a.parquet").exists():
        raise SystemExit(f"{folder}/set-a.parquet and outcomes-a.parquet not found. Pass --data_dir.")
    table = pyarrow.parquet.read_table(folder / "set-a.parquet").sort_by("Minutes")
    outcomes = pyarrow.parquet.read_table(folder / "outcomes-a.parquet")
    ids, deaths = (outcomes[name].to_numpy() for name in ("RecordID", "In-hospital_death"))
    order = np.random.default_rng(0).permutation(len(ids))
    ids, deaths = ids[order], deaths[order]
    found = table["Value"].to_numpy()
    known = found != -1  # the data's mark for a missing value
    row_of = {record: row for row, record in enumerate(ids)}
    rows = np.array([row_of[record] for record in table["RecordID"].to_numpy()])[known]
    hours = np.minimum(table["Minutes"].to_numpy()[known] // 60, HOURS - 1)
    names, columns = np.unique(table["Parameter"].to_numpy(zero_copy_only=False), return_inverse=True)
    values = np.zeros((len(ids), HOURS, len(names)), np.float32)
    masks = np.zeros_like(values)
    values[rows, hours, columns[known]] = found[known]  # by time: the last one of the hour stays
    masks[rows, hours, columns[known]] = 1
    for column in range(len(names)):
        seen = masks[..., column] == 1
        training = values[TEST_RECORDS:, :, column][seen[TEST_RECORDS:]]
        low, high = np.percentile(training, [1, 99])
        clipped = np.clip(values[..., column], low, high)
        shift, scale = training.clip(low, high).mean(), training.clip(low, high).std()
        values[..., column] = np.where(seen, (clipped - shift) / max(scale, 1e-6), 0)
    for hour in range(1, HOURS):
        values[:, hour] = np.where(masks[:, hour] == 1, values[:, hour], values[:, hour - 1])
    x = torch.from_numpy(np.concatenate([values, masks], axis=-1))
    return x, torch.from_numpy(deaths).long()


@torch.no_grad()
def auroc(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    scores = torch.cat([model(part) for part in x.split(400)]).float()
    return float(roc_auc_score(y.cpu(), (scores[:, 1] - scores[:, 0]).cpu()))


def run(way: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train one network and score it."""
    torch.set_num_threads(args.threads)
    x, y = (part.to(args.device) for part in load_data(args.data_dir))
    rows_each = [TEST_RECORDS, VALIDATION_RECORDS, len(y) - TEST_RECORDS - VALIDATION_RECORDS]
    test, validation, train = zip(x.split(rows_each), y.split(rows_each), strict=True)
    if args.quick:
        train = (train[0][:256], train[1][:256])
    model = build_model(way, seed, x.shape[-1]).to(args.device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    trainable = sum(p.numel() for p in parameters)
    if trainable != TRAINABLE.get(way, trainable):
        raise RuntimeError(f"{way}: {trainable} trainable parameters, expected {TRAINABLE[way]}.")
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=4e-6, foreach=True)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    weight = torch.tensor([1.0, 11.69], device=args.device)
    generator = torch.Generator().manual_seed(seed)
    curve = []  # of (validation, test) by epoch
    start = time.perf_counter()
    for _ in tqdm(range(args.epochs), desc=f"{way}, seed {seed}", leave=False, unit="epoch", disable=args.workers > 1):
        model.train()
        for rows in torch.randperm(len(train[1]), generator=generator).split(args.batch_size):
            optimizer.zero_grad()
            F.cross_entropy(model(train[0][rows]), train[1][rows], weight).backward()
            optimizer.step()
        schedule.step()
        curve.append([round(auroc(model, *split), 5) for split in (validation, test)])
    return {
        "way": way,
        "seed": seed,
        "auroc": max(curve, key=lambda found: found[0])[1],
        "auroc_last_epoch": curve[-1][1],
        "auroc_validation_and_test": curve,
        "trainable_parameters": trainable,
        "betas": {} if way == "full" else model.get_betas(),
        "seconds": round(time.perf_counter() - start, 1),
    }


def table(runs: dict[str, dict[str, Any]]) -> str:
    """Means over the seeds as a Markdown table."""
    lines = ["| CfC | trainable | AUROC | of full % | last epoch | paper | seeds | median beta | seconds |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    by_way = {way: [run for run in runs.values() if run["way"] == way] for way in WAYS}
    for way, found in by_way.items():
        if found:
            scores = [run["auroc"] for run in found]
            full = [run["auroc"] for run in by_way["full"]]
            share = f"{100 * mean(scores) / mean(full):.1f}" if full else ""
            last = mean(run["auroc_last_epoch"] for run in found)
            betas = [beta for run in found for beta in run["betas"].values()]
            beta = f"{np.median(betas):.3f}" if betas else ""
            lines.append(
                f"| {way} | {found[0]['trainable_parameters']:,} | {mean_and_std(scores, 4)} | {share} | {last:.4f} "
                f"| {PAPER.get(way, '')} | {len(found)} | {beta} | {mean(run['seconds'] for run in found):.0f} |"
            )
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--ways", nargs="+", choices=WAYS, default=list(DEFAULT), help=f"default: {', '.join(DEFAULT)}")
    return parse_common(parser, RESULTS, 50, "physionet2012/*.parquet", "256 records")


def main() -> None:
    args = parse_args()
    result = results_so_far(args)
    run_ways(run, args, result, "auroc")
    print(table(result["runs"]))


if __name__ == "__main__":
    main()
