"""Every architecture that the installed transformers knows, shrunk: does `LottaLoraConfig(seed=..., r=...)` work?

Each model type is built from its default configuration with every size made small (`shrink.py`). Where that builds,
runs, and is the same twice in evaluation, three ways are tried: ours by default, ours with target_modules="all-linear",
and PEFT's LoRA with "all-linear". Each injects adapters, sees which chosen layers are called and get a gradient for B
(where a batch leaves some out, also from optional inputs and from calls of the model's parts), trains two steps, saves,
loads into a fresh base model (and through our Auto class) to the bit, and merges. A refusal by name counts as such; any
other error, or another result, is a failure.

One process imports everything, then forks a child per model type. Finished ones are kept, so it can be stopped.

    python benchmarks/architectures.py --workers 2                 # 20 minutes on two cores
    python benchmarks/architectures.py --only llama mamba --again  # some of them, once more
    python benchmarks/architectures.py --output /tmp/now.json --check   # all, and compare with the recorded results
"""

from __future__ import annotations

import argparse
import json
import os
import re
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hf_lottalora  # isort: skip  # first: it registers the method with PEFT
import torch
import transformers
from common import environment, read_json, write_json
from peft import LoraConfig, PeftModel, get_peft_model
from shrink import MODEL_TYPES, batches_of, candidates, detours, main_output, shrunk_config, tensors
from torch import nn
from tqdm.auto import tqdm

RESULTS = Path(__file__).parent / "results" / "architectures.json"
GOLDEN = Path(__file__).parents[1] / "tests" / "plan" / "default_targets.json"
LARGEST, SECONDS, RANK = 20_000_000, 150, 2
WAYS: dict[str, Callable[[], Any]] = {
    "default": lambda: hf_lottalora.LottaLoraConfig(seed=42, r=RANK, init_lora_weights=False),
    "all-linear": lambda: hf_lottalora.LottaLoraConfig(
        seed=42, r=RANK, target_modules="all-linear", init_lora_weights=False
    ),
    "PEFT LoRA": lambda: LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=False),
}


def found(model_type: str) -> tuple[type[nn.Module], dict[str, torch.Tensor]]:
    """The first class of a model type that builds and runs, with inputs that it runs on.

    Raises:
        RuntimeError: none does; the message says why the first one does not.
    """
    reasons: list[str] = []
    for cls in candidates(model_type):
        try:
            with torch.device("meta"):
                size = sum(p.numel() for p in cls(shrunk_config(model_type)).parameters())
            if size > LARGEST:
                raise RuntimeError(f"{size:,} parameters even so")
            model = built(cls, model_type)
        except Exception as error:
            reasons.append(said(error))
            continue
        for batch in batches_of(model):
            try:
                once, twice = output(model, batch), output(model, batch)
            except Exception as error:
                reasons.append(said(error))
                continue
            if not torch.equal(once, twice):
                reasons.append("not deterministic in evaluation")
            elif not trains(model, batch):
                reasons.append("its own backward pass fails")
            elif not torch.isfinite(once).all():
                reasons.append("not finite")
            else:
                return cls, batch
    raise RuntimeError(reasons[0] if reasons else "no model class or no inputs for it")


def built(cls: type[nn.Module], model_type: str, seed: int = 0) -> nn.Module:
    """A model with random values, the same for the same seed, in evaluation."""
    torch.manual_seed(seed)
    return cls(shrunk_config(model_type)).eval()


def trains(model: nn.Module, batch: dict[str, torch.Tensor]) -> bool:
    """Whether a backward pass without any adapter runs in evaluation; RWKV's code overwrites what it needs."""
    try:
        main_output(model(**batch)).float().square().mean().backward()
    except Exception:
        return False
    finally:
        model.zero_grad()
    return True


def output(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return main_output(model(**batch)).clone()


def life(
    way: str, cls: type[nn.Module], model_type: str, batch: dict[str, torch.Tensor], folder: Path
) -> dict[str, Any]:
    """Inject, train, save, load and merge; what was reached, and why no more."""
    stage, facts = "inject", {}
    try:
        model = get_peft_model(built(cls, model_type), WAYS[way]())
        if way != "PEFT LoRA":
            plan = model.get_plan()
            facts = {"rule": plan.rule, **({"targets": condensed(plan.targets)} if way == "default" else {})}
        stage = "train"
        facts |= trained(model, batch)
        stage = "save"
        model.eval()
        expected = output(model, batch)
        model.save_pretrained(folder)
        stage = "load"
        again = PeftModel.from_pretrained(built(cls, model_type), folder).eval()
        difference = float((output(again, batch) - expected).abs().max())
        if difference > (1e-5 if way == "PEFT LoRA" else 0):  # its tensors may lie in memory otherwise
            raise AssertionError(f"loaded into a fresh base, outputs differ by {difference:.2g}")
        loader = way != "PEFT LoRA" and hf_lottalora.artifact.loaders.loader_of(model.config, cls.__name__)
        if loader:
            stage = f"load by {loader}"
            again = getattr(hf_lottalora, loader).from_pretrained(folder).eval()
            if not torch.equal(output(again, batch), expected):
                raise AssertionError("outputs differ")
        stage = "merge"
        if not merge_error(model, batch) < 1e-2:  # rounding may choose other codes or experts
            again = PeftModel.from_pretrained(built(cls, model_type), folder).eval().double()
            doubles = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
            if not (difference := merge_error(again, doubles)) < 1e-6:
                raise AssertionError(f"merged, outputs differ by {difference:.2g} of the largest, in float64 too")
            facts["merged"] = "the same in float64 only"
    except Exception as error:
        ours = any("hf_lottalora" in frame.filename for frame in traceback.extract_tb(error.__traceback__)[-1:])
        refused = stage == "inject" and ours and isinstance(error, (ValueError, TypeError))
        return {"status": "refused" if refused else f"failed: {stage}", "reason": said(error), **facts}
    return {"status": "works", **facts}


def merge_error(model: nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """By how much of the largest the outputs change when the adapters are merged."""
    expected = output(model, batch)
    merged = output(model.merge_and_unload().eval(), batch)
    return float((merged - expected).abs().max() / expected.abs().max().clamp_min(1e-6))


def trained(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Two steps; adapters that were never called, or whose B got no gradient."""
    layers = {path: m for path, m in model.named_modules() if getattr(m, "lora_B", None)}
    called: set[str] = set()
    hooks = [m.register_forward_hook(lambda *_, path=path: called.add(path)) for path, m in layers.items()]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    idle: set[str] = set()
    for step in range(2):
        loss = main_output(model(**batch)).float().square().mean()
        loss.backward()
        if step == 0:
            idle = {path for path in layers if path not in called or _no_gradient(layers[path])}
            idle = after_detours(model, batch, layers, idle)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for hook in hooks:
        hook.remove()
    return {"idle": condensed(path.removeprefix("base_model.model.") for path in idle)} if idle else {}


def after_detours(
    model: nn.Module, batch: dict[str, torch.Tensor], layers: dict[str, nn.Module], idle: set[str]
) -> set[str]:
    """Which of the idle layers get no gradient from other inputs either; leaves the gradients as they are."""
    before = {p: p.grad for p in model.parameters()}
    for part, inputs in detours(model.get_base_model(), batch) if idle else ():
        try:
            with_gradient = [value for value in tensors(part(**inputs)) if value.requires_grad]
            sum(value.float().square().mean() for value in with_gradient).backward()
        except Exception:  # inputs that do not fit
            continue
        idle = {path for path in idle if _no_gradient(layers[path])}
        if not idle:
            break
    for parameter, gradient in before.items():
        parameter.grad = gradient
    return idle


def _no_gradient(layer: nn.Module) -> bool:
    (B,) = layer.lora_B.values()
    return B.weight.grad is None


def condensed(paths: Any) -> list[str]:
    """Paths with their layers' numbers as stars, each once."""
    return sorted({re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path) for path in paths})


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}"[:400]


def examine(model_type: str) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        cls, batch = found(model_type)
    except RuntimeError as error:
        return {"runs": False, "reason": str(error)}
    result: dict[str, Any] = {"runs": True, "class": cls.__name__}
    for way in WAYS:
        with tempfile.TemporaryDirectory() as folder:
            result[way] = life(way, cls, model_type, batch, Path(folder))
    return {**result, "seconds": round(time.perf_counter() - start, 1)}


def in_children(model_types: list[str], workers: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """`examine` of each in a forked process, which may crash or hang, so many at a time; in the order they finish.

    This process has one thread: a fork copies the locks of others, which nobody would ever release.
    """
    waiting = iter(model_types)
    running: dict[int, tuple[str, int, list[bytes]]] = {}
    while True:
        while len(running) < workers and (name := next(waiting, None)) is not None:
            reader, child = start(name)
            running[reader] = (name, child, [])
        if not running:
            return
        for reader in select.select(list(running), [], [])[0]:
            name, child, parts = running[reader]
            if part := os.read(reader, 1 << 16):
                parts.append(part)
                continue
            os.close(reader)
            _, status = os.waitpid(child, 0)
            del running[reader]
            lost = {"runs": False, "reason": f"the process ended with status {status}"}
            yield name, json.loads(b"".join(parts)) if parts else lost


def start(model_type: str) -> tuple[int, int]:
    """A child that examines a model type: the end of a pipe that its answer comes from, and its process id."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return reader, child
    signal.alarm(SECONDS)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    torch.set_num_threads(1)
    with os.fdopen(writer, "w") as pipe:
        pipe.write(json.dumps(examine(model_type)))
    os._exit(0)


def summary(models: dict[str, Any]) -> Iterator[str]:
    """A table in Markdown, and what does not work, by name."""
    running = {name: found for name, found in models.items() if found["runs"]}
    yield f"{len(models)} model types, of which {len(running)} build and run here and are deterministic in evaluation."
    yield ""
    yield "| | works | refused by name | failed |"
    yield "|---|---:|---:|---:|"
    for way in WAYS:
        counts = Counter(found[way]["status"].partition(":")[0] for found in running.values())
        yield f"| {way} | {counts['works']} | {counts['refused']} | {counts['failed']} |"
    peft = [name for name, found in running.items() if found["PEFT LoRA"]["status"] == "works"]
    both = [name for name in peft if running[name]["all-linear"]["status"] == "works"]
    yield ""
    yield f"Of the {len(peft)} on which PEFT's LoRA works, ours with all-linear works on {len(both)}."
    if chaotic := [name for name, found in running.items() if "merged" in found["default"]]:
        yield f"\nRounding decides what these compute; their merges are compared in float64: {', '.join(chaotic)}."
    for way in ("default", "all-linear"):
        others = {name: found[way] for name, found in running.items() if found[way]["status"] != "works"}
        if others:
            yield f"\nNot {way}:\n"
        for name, one in others.items():
            yield f"- {name}: {one['status']}: {one['reason'].replace(chr(10), ' ')[:250]}"


def chosen(models: dict[str, Any]) -> dict[str, Any]:
    """What is adapted by default, for people to read."""
    return {
        name: {"class": found["class"], **{k: found["default"].get(k) for k in ("rule", "targets")}}
        for name, found in sorted(models.items())
        if found["runs"] and "targets" in found["default"]
    }


def main() -> None:
    description, _, commands = (__doc__ or "").partition("    python")
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, epilog=f"    python{commands}", formatter_class=layout)
    add = parser.add_argument
    add("--only", nargs="+", metavar="TYPE", default=list(MODEL_TYPES), help="model types (default: all)")
    add("--again", action="store_true", help="also those that have a result")
    add("--workers", type=int, default=1, help="children at a time (default: 1)")
    add("--output", type=Path, default=RESULTS, help="JSON file, also read to go on (default: the recorded one)")
    add("--check", action="store_true", help="fail where what worked in the recorded results works no more")
    args = parser.parse_args()
    if unknown := sorted(set(args.only) - set(MODEL_TYPES)):
        raise SystemExit(f"transformers {transformers.__version__} has no model types {unknown}.")
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    result = read_json(args.output) or {"models": {}}
    result["environment"] = environment()
    todo = [name for name in args.only if args.again or name not in result["models"]]
    tqdm.monitor_interval = 0  # no thread
    for done, (name, answer) in enumerate(tqdm(in_children(todo, args.workers), total=len(todo), unit="model"), 1):
        result["models"][name] = answer
        if done % 20 == 0 or done == len(todo):
            write_json(args.output, {**result, "models": dict(sorted(result["models"].items()))})
    print("\n".join(summary(result["models"])))
    if args.output == RESULTS:
        write_json(GOLDEN, chosen(result["models"]))
    if args.check:
        recorded = read_json(RESULTS)["models"]
        if worse := differences(result["models"], recorded):  # once more, alone: time may have run out
            result["models"].update(in_children(sorted(worse), workers=1))
            worse = differences(result["models"], recorded)
        if worse:
            sys.exit("\n".join(f"{name}: {what}" for name, what in worse.items()))


def differences(now: dict[str, Any], before: dict[str, Any]) -> dict[str, str]:
    """What worked before and does not now, or chooses other layers, by model type."""
    found = {}
    for name, one in now.items():
        if before.get(name, {}).get("runs"):
            for way in ("default", "all-linear"):
                status = one[way]["status"] if one["runs"] else one["reason"]
                if before[name][way]["status"] == "works" and status != "works":
                    found[name] = f"{way} worked before, now {status}"
            if one["runs"] and one["default"].get("targets") != before[name]["default"].get("targets"):
                found.setdefault(name, "other layers are chosen by default")
    return found


if __name__ == "__main__":
    main()
