"""Every benchmark runs: a few steps on real data in a fresh process, with its table, and without touching results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from data_dir import data_dir

FOLDER = Path(__file__).parents[1] / "benchmarks"
COMMANDS = {
    "mnist.py": ["--alpha", "r", "--r", "1"],
    "mnist_ablations.py": ["--only", "heads", "resampling", "decay", "--workers", "2"],
    "mnist_seed_gating.py": [],
    "mnist_rank_search.py": [],
    "physionet.py": [],
    "saved_dtypes.py": [],
    "prelora.py": ["--ways", "full", "1/5"],
    "siblings.py": [
        *("--tasks", "mnist", "digits", "cifar10", "wikitext"),
        *("--ways", "full training", "RandLoRA r = 64", "--precision", "float32"),
    ],
    "cifar10.py": ["--ways", "full", "r=1 DoRA by input", "--precision", "float32"],
}
NOT_HERE = {"sizes.py"}  # no --quick: it trains nothing
NOT_HERE |= {"sst2.py"}  # takes minutes even so
PERFORMANCE = {
    "backward_bytes.py": ["--scale", "3M"],
    "draw.py": ["--scale", "3M", "--repeats", "1"],
    "step.py": [
        "--scale",
        "3M",
        "--repeats",
        "1",
        "--tokens",
        "8",
        "--models",
        "PEFT LoRA",
        "dense",
        "streamed, 1 bit",
    ],
    "training.py": ["--scale", "3M", "--repeats", "1", "--tokens", "8", "--models", "PEFT LoRA", "packed, 1 bit"],
    "conv.py": ["--repeats", "1", "--batch", "4"],
    "scales.py": ["--plot"],
    "gpu.py": ["--scale", "3M", "--repeats", "1", "--rows", "2", "--tokens", "8", "--device", "cpu"],
    "decode.py": ["--scale", "3M", "--repeats", "1"],
    "ready.py": ["--scale", "3M", "--repeats", "1", "--ways", "artifact, packed", "checkpoint, cold"],
    "many.py": ["--adapters", "3", "--repeats", "1"],
    "large.py": ["--layers", "1", "--tokens", "8"],
    "sharing.py": ["--scale", "3M", "--repeats", "1"],
    "export.py": ["--scale", "3M"],
    "sources.py": ["--sizes", "1x8", "--repeats", "1", "--parts", "steps", "files"],
    "prelora_steps.py": ["--widths", "128", "--repeats", "1"],
}
SCALE = {
    "clm_900m.py": ["--scale", "3M", "--steps", "2", "--residencies", "dense", "streamed"],
    "engines.py": [
        *("--scale", "3M", "--repeats", "1", "--parts", "engines", "--engines", "FSDP2"),
        *("--methods", "packed, 1 bit, trained embeddings"),
    ],
    "model.py": ["--gpus", "8", "1024", "--shapes", "7B"],
}


def test_every_benchmark_is_listed() -> None:
    assert {path.name for path in FOLDER.glob("*.py")} == {"architectures.py", "common.py", "shrink.py", "tables.py"}
    assert {path.name for path in (FOLDER / "paper").glob("*.py")} == {
        *COMMANDS,
        "cli.py",
        "siblings_tasks.py",
    } | NOT_HERE
    assert {path.name for path in (FOLDER / "perf").glob("*.py")} == {*PERFORMANCE, "shared.py"}
    assert {path.name for path in (FOLDER / "scale").glob("*.py")} == {*SCALE, "costs.py", "traffic.py", "worker.py"}


def test_rates_are_tried_until_the_best_has_neighbours() -> None:
    import siblings

    def score(rate: float) -> float:
        return -abs(rate - 0.03)

    tried: dict[float, float] = {}
    while rates := siblings.rates_to_try(tried, max):
        tried |= {rate: score(rate) for rate in rates}
    assert list(tried) == [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
    assert siblings.rates_to_try({1e-3: 1.0, 3e-3: 2.0, 1e-2: 3.0}, min) == [3e-4]
    assert siblings.rates_to_try({1e-3: 1.0}, max, quick=True) == []


def test_siblings_are_compared_with_lora_of_their_size() -> None:
    import siblings

    sizes = {"head and betas": (10, 0.0), "LoRA r = 1": (1000, 80.0), "RandLoRA r = 64": (100, 50.0)}
    sizes["NOLA k = 256"] = (5000, 90.0)
    runs = {
        f"mnist/drawn/{way}/seed=42": {"score": score, "trained": size, "bytes": {"exact": 4 * size}}
        for way, (size, score) in sizes.items()
    }
    rows = siblings.summarise(runs, "mnist", "drawn")
    assert [round(rows["RandLoRA r = 64"][name], 6) for name in ("by parameters", "by bytes")] == [10, 10]
    assert rows["NOLA k = 256"]["by bytes"] == 10 and "by bytes" not in rows["LoRA r = 1"]


@pytest.mark.smoke
@pytest.mark.parametrize("script", COMMANDS)
def test_a_quick_run_shows_a_table_and_writes_nothing(script: str) -> None:
    before = results()
    command = [sys.executable, f"paper/{script}", "--quick", "--data_dir", str(data_dir()), *COMMANDS[script]]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "|---" in done.stdout or "r* =" in done.stdout or "none of these ranks" in done.stdout
    assert results() == before


def results() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in (FOLDER / "results").rglob("*.*") if path.is_file()}


@pytest.mark.smoke
@pytest.mark.parametrize("script", [*(f"perf/{name}" for name in PERFORMANCE), *(f"scale/{name}" for name in SCALE)])
def test_performance_benchmarks_run(script: str, tmp_path: Path) -> None:
    before, output = results(), tmp_path / "found.json"
    folder, _, name = script.partition("/")
    command = [sys.executable, script, "--output", str(output), *{"perf": PERFORMANCE, "scale": SCALE}[folder][name]]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "|---" in done.stdout and output.stat().st_size > 500 and results() == before


@pytest.mark.smoke
def test_the_sweep_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    for names in (["llama", "encodec"], ["llama", "convnext", "dinat"]):
        command = [sys.executable, "architectures.py", "--output", str(output), "--only", *names]
        done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    models = json.loads(output.read_text())["models"]
    assert {name: models[name]["runs"] and models[name]["default"]["status"] for name in models} == {
        "convnext": "works", "dinat": False, "encodec": "refused", "llama": "works"
    }  # fmt: skip
    assert "4 model types, of which 3 build and run here" in done.stdout and "2/2" in done.stderr


@pytest.mark.smoke
def test_the_page_of_results_is_that_of_the_files() -> None:
    done = subprocess.run([sys.executable, "tables.py", "--check"], cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.smoke
def test_help_and_missing_data() -> None:
    done = subprocess.run([sys.executable, "paper/mnist.py", "--help"], cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0 and "python benchmarks/paper/mnist.py" in done.stdout
    done = subprocess.run(
        [sys.executable, "paper/cifar10.py", "--quick", "--data_dir", "nowhere"],
        cwd=FOLDER,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "nowhere/cifar10-jpeg/train.parquet not found" in done.stderr
