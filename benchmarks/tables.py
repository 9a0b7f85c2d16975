"""Write the tables of README.md and docs/ from the result files, each between its two marks.

python benchmarks/tables.py            # rewrite the pages
python benchmarks/tables.py --check    # only say whether they are up to date
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "paper"))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import architectures
import cifar10
import digits_demo
import mnist
import mnist_ablations
import mnist_rank_search
import mnist_seed_gating
import physionet
import prelora
import saved_dtypes
import siblings
import sizes
import sst2
from common import read_json

from hf_lottalora import RankSearch

ROOT = Path(__file__).parents[1]
_STEMS = (
    *("results", "performance", "architectures", "artifact-size", "causal-lm", "export", "low-memory", "many"),
    *("prelora", "several-processes", "siblings"),
)
NAMES = ("README.md", *(f"docs/{stem}.md" for stem in _STEMS))
PAGES = [ROOT / name for name in NAMES]
PERFORMANCE = Path(__file__).parent / "results" / "perf"
SCALE = PERFORMANCE.with_name("scale")


def _ablation(table: str) -> Callable[[], str]:
    def text() -> str:
        runs = read_json(mnist_ablations.RESULTS)["runs"]
        return mnist_ablations.markdown(table, mnist_ablations.rows(table, runs))

    return text


def _rank_search() -> str:
    found = read_json(mnist_rank_search.RESULTS)
    losses = {int(rank): {int(seed): loss for seed, loss in runs.items()} for rank, runs in found["runs"].items()}
    return f"```\n{RankSearch(found['rank'], found['settings']['epsilon'], losses)}\n```"


def _cifar10(stem: str) -> Callable[[], str]:
    return lambda: cifar10.table(read_json(cifar10.RESULTS.with_stem(stem))["runs"])


def _siblings(text: Callable[..., str], *case: str, stem: str = "siblings") -> Callable[[], str]:
    return lambda: text(read_json(siblings.RESULTS.with_stem(stem))["runs"], *case)


def _controls() -> str:
    """What the README claims: LottaLoRA beside full training, and beside the same trained parameters over zeros."""
    lines = [
        "| task | LottaLoRA | every weight trained | zero backbone | command |",
        "|---|---:|---:|---:|---|",
    ]
    by_way = mnist.summarise(read_json(mnist.RESULTS)["runs"])
    zeros = mnist_ablations.rows("scaffold", read_json(mnist_ablations.RESULTS)["runs"])
    for r in (1, 8):
        cells = [row for row in by_way if row["preset"] == "medium" and (row["r"], row["alpha"]) in ((r, "r"), (0, ""))]
        means = {row["method"]: row["mean"] for row in cells}
        (zero,) = (row["mean"] for row in zeros if (row["variant"], row["r"]) == ("zero", r))
        scores = f"{means['lottalora']:.2f} % | {means['full']:.2f} % | {zero:.2f} %"
        lines.append(f"| MNIST, r = {r} | {scores} | `mnist.py`, `mnist_ablations.py` |")
    found = {method: 100 * row["mean"] for method, row in read_json(sst2.RESULTS)["summary"].items()}
    scores = f"{found['lottalora']:.2f} % | {found['full']:.2f} % | {found['zero']:.2f} %"
    lines.append(f"| sentiment of film reviews (SST-2) from scratch, r = 8 | {scores} | `sst2.py` |")
    runs = read_json(physionet.RESULTS)["runs"].values()
    auroc = {way: mean(run["auroc"] for run in runs if run["way"] == way) for way in ("r=1", "full", "r=1 zero")}
    scores = " | ".join(f"{value:.3f}" for value in auroc.values())
    lines.append(f"| mortality in intensive care, AUROC, r = 1 | {scores} | `physionet.py` |")
    return "\n".join(lines)


def _performance(script: str, *keys: str, folder: Path = PERFORMANCE) -> Callable[[], str]:
    """The rows of a script's runs, of all or of those named, a table each."""

    def text() -> str:
        runs = read_json(folder / f"{script}.json")["runs"]
        return "\n\n".join("\n".join(_rows(key, run)) for key, run in runs.items() if not keys or key in keys)

    return text


def _scale(script: str, runs: str, *columns: str, **only: Sequence[Any]) -> Callable[[], str]:
    """Of the runs with `runs` in their names, the columns that are named or all, of rows with these values only."""

    def text() -> str:
        tables = []
        for key, run in read_json(SCALE / f"{script}.json")["runs"].items():
            if runs in key:
                chosen = [row for row in run["rows"] if all(row[name] in values for name, values in only.items())]
                rows = [{name: row[name] for name in columns or row} for row in chosen]
                tables.append("\n".join(_rows(key, {"rows": rows})))
        return "\n\n".join(tables)

    return text


def _rows(key: str, run: dict[str, Any]) -> Iterator[str]:
    columns = [name for name in run["rows"][0] if any(row[name] != "" for row in run["rows"])]
    yield f"| {key} | {' | '.join(columns[1:])} |"
    yield "|---|" + "---:|" * (len(columns) - 1)
    for row in run["rows"]:
        cells = [row[name] for name in columns]
        yield "| " + " | ".join(_number(cell) if isinstance(cell, float) else str(cell) for cell in cells) + " |"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


_SENT = (("broadcast", ""), ("all-gather", " a step"), ("reduce-scatter", " a step"), ("all-reduce", " a step"))
_TAKEN = (
    *("peak / shard", "peak to step 1 / shard", "seconds building", "building / efficient"),
    *("seconds to step 1", "to step 1 / efficient", "repeats"),
)
_COMPARED = ("model", "measured", "measured / model")

TABLES: dict[str, Callable[[], str]] = {
    "controls": _controls,
    "demo": lambda: f"```\n{digits_demo.table(read_json(ROOT / 'docs/assets/digits_demo.json'))}\n```",
    "architectures": lambda: "\n".join(architectures.summary(read_json(architectures.RESULTS)["models"])),
    "mnist": lambda: mnist.table(mnist.summarise(read_json(mnist.RESULTS)["runs"])),
    **{table: _ablation(table) for table in mnist_ablations.TABLES},
    "rank search": _rank_search,
    "seed gating": lambda: mnist_seed_gating.table(read_json(mnist_seed_gating.RESULTS)["runs"]),
    "physionet": lambda: physionet.table(read_json(physionet.RESULTS)["runs"]),
    "sizes": lambda: sizes.table(read_json(sizes.RESULTS)["artifacts"]),
    "saved dtypes": lambda: saved_dtypes.table(read_json(saved_dtypes.RESULTS)["runs"]),
    "prelora": lambda: prelora.summary(read_json(prelora.RESULTS)["runs"]),
    "prelora, phases": lambda: prelora.table(read_json(prelora.RESULTS)["runs"]),
    **{
        f"siblings, {name}{task}, {backbone}": _siblings(text, task, backbone)
        for name, text in (("", siblings.table), ("rates, ", siblings.rates_table))
        for task, of in siblings.TASKS.items()
        for backbone in of.backbones
    },
    "siblings, 20 epochs": _siblings(siblings.table, "mnist", "drawn", stem="siblings_20_epochs"),
    "cifar10": _cifar10("cifar10"),
    "cifar10 10 epochs": _cifar10("cifar10_10_epochs"),
    **{
        script: _performance(script)
        for script in ("conv", "decode", "export", "large", "many", "prelora_steps", "scales", "sources", "step")
    },
    "engines, bytes": _scale("engines", " processes", "engine", "method", *(f"{kind} MB{at}" for kind, at in _SENT)),
    "engines, memory": _scale("engines", " processes", "engine", "method", *_TAKEN),
    "engines, steps": _scale("engines", "a step under DDP"),
    "engines, losses": _scale("engines", "losses of"),
    "model of scale": _scale("model", ", ", GPUs=(8, 1024)),
    "model of scale, check": _scale("model", "check", "at", "engine", "method", *_COMPARED, what=["peak MB"]),
    "training": _performance("training", *(f"{at}/4x128" for at in ("base/float32", "base/bfloat16", "900M/bfloat16"))),
    "training, 900M": _performance("training", "900M/bfloat16/4x128"),
    **{script: _performance(script, "900M") for script in ("draw", "ready")},
    "clm_900m": _performance("clm_900m", folder=PERFORMANCE.with_name("scale")),
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
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        new = filled(page)
        if args.check and new != page:
            raise SystemExit(f"{path} is not what the result files say: run {__file__}.")
        if not args.check:
            path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
