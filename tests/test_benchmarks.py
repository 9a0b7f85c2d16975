"""Every benchmark runs: a few steps on real data in a fresh process, with its table, and without touching results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from data_dir import data_dir

FOLDER = Path(__file__).parents[1] / "benchmarks"
COMMANDS = {
    "mnist.py": ["--alpha", "r", "--r", "1"],
    "mnist_ablations.py": ["--only", "heads", "resampling", "--workers", "2"],
    "mnist_seed_gating.py": [],
    "mnist_rank_search.py": [],
    "physionet.py": [],
    "cifar10.py": ["--ways", "full", "r=1 DoRA by input"],
}
NOT_HERE = {"backward_bytes.py", "draw.py", "paper_sizes.py"}  # no --quick: they train nothing
NOT_HERE |= {"sst2.py"}  # takes minutes even so
HELPERS = {"cli.py", "jobs.py", "report.py"}


def test_every_benchmark_is_listed() -> None:
    assert {path.name for path in FOLDER.glob("*.py")} == {*COMMANDS} | NOT_HERE | HELPERS


@pytest.mark.parametrize("script", COMMANDS)
def test_a_quick_run_shows_a_table_and_writes_nothing(script: str) -> None:
    before = {path: path.read_bytes() for path in (FOLDER / "results").iterdir()}
    command = [sys.executable, script, "--quick", "--data_dir", str(data_dir()), *COMMANDS[script]]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "|---" in done.stdout or "r* =" in done.stdout or "none of these ranks" in done.stdout
    assert {path: path.read_bytes() for path in (FOLDER / "results").iterdir()} == before


def test_help_and_missing_data() -> None:
    done = subprocess.run([sys.executable, "mnist.py", "--help"], cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0 and "python benchmarks/mnist.py" in done.stdout
    done = subprocess.run(
        [sys.executable, "cifar10.py", "--quick", "--data_dir", "nowhere"], cwd=FOLDER, capture_output=True, text=True
    )
    assert done.returncode == 1 and "nowhere/cifar10-jpeg/train.parquet not found" in done.stderr
