"""What the command lines of the benchmarks that train share: arguments, and results that are kept between calls."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import environment, kept_for_backward, mean_and_std, read_json, run_jobs, write_json

__all__ = ["environment", "kept_for_backward", "mean_and_std", "read_json", "run_jobs", "write_json"]
RESULTS = Path(__file__).parents[1] / "results"

FIRST_SEED = 42


def new_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the script's docstring, with its commands at the end."""
    description, _, commands = (doc or "").partition("    python")
    layout = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, epilog=f"    python{commands}", formatter_class=layout)


def parse_common(
    parser: argparse.ArgumentParser, results: Path, epochs: int, data: str, quick: str
) -> argparse.Namespace:
    """Parse the command line with the common arguments added.

    Args:
        parser: from `new_parser`, with the script's own arguments.
        results: where the results go unless told otherwise.
        epochs: by default.
        data: what the data folder holds, for the help.
        quick: how much of the data a smoke run takes, for the help.
    """
    add = parser.add_argument
    add("--data_dir", type=Path, help=f"holds {data} (default: $LOTTALORA_DATA, or ../shared/data)")
    add("--output", type=Path, default=results, help=f"result file, also read to go on (default: {results.name})")
    add("--seeds", type=int, default=3, help=f"how many, from {FIRST_SEED} on (default: 3)")
    add("--epochs", type=int, default=epochs, help=f"default: {epochs}")
    add("--batch_size", type=int, default=128)
    add("--device", default="cpu")
    add("--threads", type=int, default=1, help="of torch, in each worker (default: 1)")
    add("--workers", type=int, default=1, help="runs at a time, each in a process of its own (default: 1)")
    add("--quick", action="store_true", help=f"smoke run: {quick}, one epoch, one seed, not recorded")
    args = parser.parse_args()
    args.data_dir = args.data_dir or Path(os.environ.get("LOTTALORA_DATA") or "../shared/data")
    args.recorded = not args.quick
    if args.quick:
        args.seeds, args.epochs = 1, 1
    return args


def seeds_of(args: argparse.Namespace) -> range:
    """The seeds to run."""
    return range(FIRST_SEED, FIRST_SEED + args.seeds)


def results_so_far(args: argparse.Namespace, **settings: Any) -> dict[str, Any]:
    """What the result file holds, with `settings` and the environment; refuses runs that were made with other ones."""
    settings |= {"epochs": args.epochs, "batch_size": args.batch_size}
    result = (read_json(args.output) if args.recorded else None) or {"settings": settings, "runs": {}}
    if result["settings"] != settings:
        raise SystemExit(f"{args.output} holds runs with other settings: {result['settings']}. Pass another --output.")
    result["environment"] = environment()
    return result


def run_ways(run: Callable[..., dict[str, Any]], args: argparse.Namespace, result: dict[str, Any], shown: str) -> None:
    """`run(way, seed, args)` for each way and seed that has no result yet; `shown` is what a line shows of it."""
    jobs = {f"{way}/seed={seed}": (way, seed, args) for seed in seeds_of(args) for way in args.ways}
    jobs = {key: job for key, job in jobs.items() if key not in result["runs"]}
    for key, found in run_jobs(run, jobs, args.workers):
        result["runs"][key] = found
        tqdm.write(f"{key}: {found[shown]}, {found['seconds']} s")
        if args.recorded:
            write_json(args.output, result)
