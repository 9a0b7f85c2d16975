"""What the performance benchmarks share: the models, one training step, and timing in pairs."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hf_lottalora  # isort: skip  # first: it registers the method with PEFT
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "paper"))

from common import environment, read_json, write_json
from common import kept_for_backward as kept_for_backward

RESULTS = Path(__file__).parents[1] / "results" / "perf"

# Layers, width, heads, width of the MLP; vocabulary 32,000 tied. "base" is the setting of most figures, the others are
# the paper's.
SCALES = {
    "3M": (6, 64, 4, 192),
    "30M": (10, 384, 6, 1_024),
    "base": (12, 768, 12, 2_048),
    "300M": (22, 1_024, 16, 2_816),
    "600M": (30, 1_344, 21, 3_584),
    "900M": (34, 1_664, 26, 4_608),
}
VOCABULARY, RANK = 32_000, 8


def llama_config(scale: str) -> LlamaConfig:
    layers, width, heads, mlp = SCALES[scale]
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        tie_word_embeddings=True,
        max_position_embeddings=4_096,
    )


def build(kind: str, scale: str, dtype: torch.dtype, on_meta: bool | None = None, **options: Any) -> nn.Module:
    """A model to train, r = 8 on all linear layers.

    Args:
        kind: "full", "peft" (`LoraConfig`) or "ours" (`LottaLoraConfig`).
        scale: a key of `SCALES`.
        dtype: of the base model; adapters are float32, as in PEFT.
        on_meta: whether to build ours without memory for the weights; default: where they are not dense.
        options: of `LottaLoraConfig`, of `LoraConfig` target_modules alone; embeddings and norms are frozen unless
            they say otherwise, as in PEFT's LoRA.
    """
    if on_meta if on_meta is not None else options.get("residency", "dense") != "dense":
        from accelerate import init_empty_weights

        with init_empty_weights(include_buffers=False):
            base = LlamaForCausalLM._from_config(llama_config(scale), dtype=dtype)
        base.tie_weights()
    else:
        base = LlamaForCausalLM._from_config(llama_config(scale), dtype=dtype)
    if kind == "full":
        return base
    settings: dict[str, Any] = {"r": RANK, "target_modules": options.pop("target_modules", "all-linear")}
    if kind == "peft":
        return get_peft_model(base, LoraConfig(**settings))
    settings |= {"seed": 42, "embeddings": "frozen", "norms": "frozen"}
    return get_peft_model(base, hf_lottalora.LottaLoraConfig(**{**settings, **options}))


def training_step(model: nn.Module, rows: int, tokens: int, vocabulary: int = VOCABULARY) -> Callable[[], None]:
    """A function that makes one step with AdamW on random tokens."""
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    batch = torch.randint(0, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(0))
    batch = batch.to(parameters[0].device)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, foreach=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()

    return step


def seconds(function: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    function()
    return clock() - start


def memory(field: str) -> int:
    """Bytes of this process by Linux: "VmRSS" resident now, "VmHWM" resident at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def in_fresh_process(script: str, *arguments: str) -> Any:
    """What this script prints as JSON in its last line, run with these arguments."""
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def paired(
    candidates: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each candidate, one after the other in each repeat, every second time in the other order."""
    for function in candidates.values():
        function()  # what is made once is made now
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(repeats):
        for name in list(candidates)[:: -1 if repeat % 2 else 1]:
            times[name].append(seconds(candidates[name], clock))
    return times


def ratio(times: dict[str, list[float]], name: str, peer: str) -> float:
    """Median of the paired ratios."""
    return statistics.median(a / b for a, b in zip(times[name], times[peer], strict=True))


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Rows with the same keys as a Markdown table."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    for row in rows:
        cells = (f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row.values())
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def record(output: str | Path, key: str, rows: Sequence[dict[str, Any]], **facts: Any) -> None:
    """Print the rows of one run, and keep them with what else is known of it beside the other runs in a JSON file."""
    print(f"\n{key}\n{markdown(rows)}")
    result = read_json(output) or {"runs": {}}
    result["runs"][key] = {"environment": environment(), **facts, "rows": rows}
    write_json(output, result)
