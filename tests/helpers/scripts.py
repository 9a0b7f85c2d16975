"""Running a script of `examples/` in this process, and commands in others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TORCHRUN = [BIN / "torchrun", "--standalone", "--nproc_per_node", "2"]


def run_script(
    script: ModuleType, arguments: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """Its results, and under "trainer", "folder" and "losses" its Trainer, its output and the losses that it logged."""
    kept: list[Any] = []

    def new_trainer(*args: Any, **kwargs: Any) -> Any:
        kept.append(made(*args, **kwargs))
        return kept[0]

    made = sys.modules["training"].new_trainer
    monkeypatch.setattr(script, "new_trainer", new_trainer)
    command = [str(script.__file__), *arguments, "--output_dir", str(folder), "--use_cpu", "--disable_tqdm", "True"]
    monkeypatch.setattr(sys, "argv", command)
    script.main()
    results = json.loads((folder / "all_results.json").read_text())
    history = kept[0].state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    return {**results, "folder": folder, "losses": losses, "trainer": kept[0]}


def launch(command: list[Any]) -> str:
    """Run a command to its end; returns its output, raises with it."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [str(part) for part in command], env=environment, text=True, timeout=300, capture_output=True, cwd=ROOT
    )
    if done.returncode:
        raise RuntimeError(f"exit status {done.returncode}: {done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done.stdout
