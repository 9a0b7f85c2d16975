"""PreLoRA (arXiv 2509.21619) on CIFAR-10: full training of a small Vision Transformer, then adapters alone.

A ViT, 128 wide, 4 layers, patches of 8 x 8 pixels, trained from torch's own start; random crops and flips. Ways:

- `full`: every weight to the end;
- `1/5`, `0.5/2.5`, `0.25/1`: PreLoRA with the paper's thresholds, percent for weights and loss;
- `1/5 by gradients`: the ranks chosen by the change of gradients, as the authors' script does.

The paper's numbers are scaled to the run: windows of 4 % of it (the authors' 1,000 steps are far less), 10 % of it for
base and adapters together, ranks 1, 2, 4 and 8 for 128 wide layers (4 to 32 for 1,024), on all linear layers of the
attention and the MLP. AdamW, learning rate 1e-3, weight decay 0.05, cosine after 5 % linear warm-up, in float32.

Of each phase: the median time of a step (forward, backward, optimizer; the CPU's time, which other programs on the
machine lengthen less than the clock's), the bytes of weights, gradients and moments, what is kept for backward, and the
peak of the process. The accuracy is that of the end, on the 10,000 test images; nothing is chosen by it.

    python benchmarks/paper/prelora.py --seeds 1        # about an hour on one core
    python benchmarks/paper/prelora.py --quick          # seconds, to see that it runs

Finished runs are kept, so it can be interrupted and repeated. `--plot` draws the phases beside the results.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from cifar10 import augmented, load_split
from cli import RESULTS as FOLDER
from cli import kept_for_backward, new_parser, parse_common, results_so_far, run_ways
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from hf_lottalora import LottaLoraConfig, PreLoraCallback

WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "1/5": {"thresholds": (1, 5)},
    "0.5/2.5": {"thresholds": (0.5, 2.5)},
    "0.25/1": {"thresholds": (0.25, 1)},
    "1/5 by gradients": {"thresholds": (1, 5), "rank_by": "gradients"},
}
RANKS = (1, 2, 4, 8)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
SIZES = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
RESULTS = FOLDER / "prelora.json"


def build_model(seed: int) -> ViTForImageClassification:
    set_seed(seed)
    return ViTForImageClassification(ViTConfig(**SIZES, image_size=32, patch_size=8, num_labels=10))


class Crops:
    """A batch of images and labels, cropped and mirrored at random."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        images, labels = (torch.stack(part) for part in zip(*rows, strict=True))
        return {"pixel_values": augmented(images, self.generator), "labels": labels}


class Meter(TrainerCallback):
    """Time and memory of each phase."""

    def __init__(self, prelora: PreLoraCallback | None) -> None:
        self.prelora = prelora
        self.cpu: dict[str, list[float]] = {}
        self.wall: dict[str, list[float]] = {}
        self.bytes: dict[str, dict[str, int]] = {}
        self.phase = ""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        now = "full" if self.prelora is None else self.prelora.phase
        if now != self.phase:
            self._close()
            self.phase = now
            reset_peak()
        self.began = time.process_time(), time.perf_counter()

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        for kept, clock, start in zip(
            (self.cpu, self.wall), (time.process_time, time.perf_counter), self.began, strict=True
        ):
            kept.setdefault(self.phase, []).append(clock() - start)
        if self.phase not in self.bytes:
            parameters = list(model.parameters())
            gradients = [p.grad for p in parameters if p.grad is not None]
            moments = [v for held in optimizer.state.values() for v in held.values() if isinstance(v, Tensor)]
            parts = {"weights": parameters, "gradients": gradients, "moments": moments}
            self.bytes[self.phase] = {name: sum(t.nbytes for t in tensors) for name, tensors in parts.items()}
            trained = [p.numel() for p in parameters if p.requires_grad]
            self.bytes[self.phase] |= {"trained": sum(trained), "parameters": sum(p.numel() for p in parameters)}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._close()

    def _close(self) -> None:
        if self.phase:
            self.bytes[self.phase]["process peak"] = peak()

    def found(self) -> dict[str, dict[str, Any]]:
        return {
            phase: {
                "steps": len(times),
                "cpu_ms_per_step": round(1e3 * median(times), 2),
                "wall_ms_per_step": round(1e3 * median(self.wall[phase]), 2),
                "cpu_seconds": round(sum(times), 1),
                **self.bytes[phase],
            }
            for phase, times in self.cpu.items()
        }


def peak() -> int:
    """Largest resident memory of this process since `reset_peak`, in bytes; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return  # then the peak is that of the run so far


class Kept(Trainer):
    """A Trainer that counts, in the first step of each phase, the bytes that are kept for backward."""

    meter: Meter
    kept: dict[str, int]

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if not model.training or self.meter.phase in self.kept:
            return super().compute_loss(model, inputs, *args, **kwargs)
        with kept_for_backward(model) as storages:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.kept[self.meter.phase] = sum(storages.values())
        return loss


def run(way: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train one network and score it."""
    torch.set_num_threads(args.threads)
    train, test = (load_split(args.data_dir, name, 1000 if args.quick else None) for name in ("train", "test"))
    steps = args.epochs * -(-len(train[1]) // args.batch_size)
    window = max(steps // 25, 1)
    prelora = None
    if way != "full":
        config = LottaLoraConfig(seed=seed, redraw="none", train_beta=False, save_kept=True, target_modules=TARGETS)
        lengths = {"window": window, "joint_steps": max(steps // 10, 1), "rewarmup_steps": steps // 100}
        prelora = PreLoraCallback(config, ranks=RANKS, **lengths, **WAYS[way])
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            output_dir=folder, num_train_epochs=args.epochs, per_device_train_batch_size=args.batch_size,
            learning_rate=args.lr, weight_decay=0.05, lr_scheduler_type="cosine", warmup_steps=steps // 20, seed=seed,
            logging_steps=window, save_strategy="no", report_to="none", use_cpu=args.device == "cpu",
            per_device_eval_batch_size=500, remove_unused_columns=False, disable_tqdm=args.workers > 1,
        )  # fmt: skip
        meter = Meter(prelora)
        trainer = Kept(
            build_model(seed), options, Crops(seed), torch.utils.data.TensorDataset(*train), callbacks=[meter]
        )
        trainer.meter, trainer.kept = meter, {}
        if prelora is not None:
            prelora.attach(trainer)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        phases = {name: {**found, "kept for backward": trainer.kept[name]} for name, found in meter.found().items()}
        result: dict[str, Any] = {
            "way": way,
            "seed": seed,
            "test_accuracy": round(accuracy(trainer.model, *test), 6),
            "seconds": round(seconds, 1),
            "cpu_seconds": round(sum(found["cpu_seconds"] for found in phases.values()), 1),
            "phases": phases,
        }
        result["last_loss"] = next(e["loss"] for e in reversed(trainer.state.log_history) if "loss" in e)
        if prelora is not None:
            report = prelora.report
            result |= {"converged_at": report.converged_at, "of_steps": steps, "ranks": report.ranks}
            result["windows"] = [[w.step, w.phase, w.loss, w.loss_change, w.weight_changes] for w in report.windows]
            if args.plot and report.windows:
                report.plot(args.output.with_name(f"{args.output.stem}_{way.replace('/', '_').replace(' ', '_')}.png"))
    return result


@torch.no_grad()
def accuracy(model: Any, x: Tensor, y: Tensor) -> float:
    model.eval()
    return float((torch.cat([model(part).logits for part in x.split(500)]).argmax(-1) == y).float().mean())


def table(runs: dict[str, dict[str, Any]]) -> str:
    """A row for each phase of each way, and the whole run beside full training, as a Markdown table."""
    lines = [
        "| way | phase | steps | trained % | CPU ms a step | weights, gradients, moments MB | kept for backward MB "
        "| peak of the process MB |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for found in runs.values():
        for name, phase in found["phases"].items():
            states = sum(phase[part] for part in ("weights", "gradients", "moments"))
            numbers = (f"{value / 1e6:.1f}" for value in (states, phase["kept for backward"], phase["process peak"]))
            share = 100 * phase["trained"] / phase["parameters"]
            lines.append(
                f"| {found['way']} | {name} | {phase['steps']:,} | {share:.1f} | {phase['cpu_ms_per_step']:.1f} "
                f"| {' | '.join(numbers)} |"
            )
    return "\n".join(lines)


def summary(runs: dict[str, dict[str, Any]]) -> str:
    """Each way as a whole, as a Markdown table; times over what its own full phase takes, in the same minutes."""
    lines = [
        "| way | converged after | test accuracy % | trained at the end % | time of a step, adapters alone "
        "| time of the whole run | memory, adapters alone |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for found in runs.values():
        phases, full = found["phases"], found["phases"]["full"]
        last = phases.get("lora")
        at = found.get("converged_at")
        steps = sum(phase["steps"] for phase in phases.values())
        whole = sum(phase["steps"] * phase["cpu_ms_per_step"] for phase in phases.values())
        row = [found["way"], "", f"{100 * found['test_accuracy']:.2f}", "100", "", "", ""]
        if found["way"] != "full":
            row[1] = "never" if at is None else f"{at:,} of {steps:,} steps"
            row[5] = f"{whole / (steps * full['cpu_ms_per_step']):.2f}"
        if last is not None:
            row[3] = f"{100 * last['trained'] / last['parameters']:.1f}"
            row[4] = f"{last['cpu_ms_per_step'] / full['cpu_ms_per_step']:.2f}"
            row[6] = f"{_memory(last) / _memory(full):.2f}"
        lines.append("| " + " | ".join(row) + " |")
    lines.append("| *the paper's abstract* | | as full training | 10 | 0.33 (3x) | 0.67 (1.5x) | 0.80 |")
    return "\n".join(lines)


def _memory(phase: dict[str, Any]) -> int:
    return int(sum(phase[part] for part in ("weights", "gradients", "moments", "kept for backward")))


def parse_args() -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="default: all")
    add("--lr", type=float, default=1e-3, help="default: 1e-3")
    add("--plot", action="store_true", help="draw the phases of each way beside the result file (needs matplotlib)")
    return parse_common(parser, RESULTS, 4, "cifar10-jpeg/*.parquet", "1,000 images")


def main() -> None:
    args = parse_args()
    if args.quick and args.batch_size == 128:
        args.batch_size = 32  # enough steps for three windows
    result = results_so_far(args, lr=args.lr)
    run_ways(run, args, result, "test_accuracy")
    print(summary(result["runs"]))
    print()
    print(table(result["runs"]))


if __name__ == "__main__":
    main()
