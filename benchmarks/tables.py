"""Write the tables of docs/results.md from the result files, each between its two marks.

python benchmarks/tables.py            # rewrite the page
python benchmarks/tables.py --check    # only say whether it is up to date
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

import cifar10
import mnist
import mnist_ablations
import mnist_seed_gating
import physionet
from report import read_json

PAGE = Path(__file__).parents[1] / "docs" / "results.md"


def _ablation(table: str) -> Callable[[], str]:
    def text() -> str:
        runs = read_json(mnist_ablations.RESULTS)["runs"]
        return mnist_ablations.markdown(table, mnist_ablations.rows(table, runs))

    return text


TABLES: dict[str, Callable[[], str]] = {
    "mnist": lambda: mnist.table(mnist.summarise(read_json(mnist.RESULTS)["runs"])),
    **{table: _ablation(table) for table in mnist_ablations.TABLES},
    "seed gating": lambda: mnist_seed_gating.table(read_json(mnist_seed_gating.RESULTS)["runs"]),
    "physionet": lambda: physionet.table(read_json(physionet.RESULTS)["runs"]),
    "cifar10": lambda: cifar10.table(read_json(cifar10.RESULTS)["runs"]),
}


def filled(page: str) -> str:
    """The page with each `<!-- table: NAME -->` ... `<!-- end -->` written anew."""

    def write(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n\n{TABLES[match[1]]().strip()}\n\n<!-- end -->"

    return re.sub(r"<!-- table: (.+?) -->.*?<!-- end -->", write, page, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with an error if the page is not up to date")
    args = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    new = filled(page)
    if args.check:
        raise SystemExit(0 if new == page else f"{PAGE} is not what the result files say: run {__file__}.")
    PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
