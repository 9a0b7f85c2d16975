"""Kills processes (SIGKILL) while they save over an artifact, and counts what is there afterwards: old, new, or lost.

    python tests/artifact/kills.py --random 200    # at random moments
    python tests/artifact/kills.py --points        # before each call that changes something in the folder
    python tests/artifact/kills.py --together 3    # nobody is killed: two save at once for 3 seconds, a third one loads

Prints a JSON object of counts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import torch
from peft import PeftModel, get_peft_model
from tiny import config, llama, perturb
from transformers.utils import logging

from hf_lottalora import AutoLottaLoraModelForCausalLM
from hf_lottalora.artifact.current import current

NAMES = ("adapter_model.safetensors", "adapter_config.json", "config.json", "README.md")
SMALL = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
EVENTS = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod")


def artifact(perturbations: int, architecture: dict[str, Any], **options: Any) -> PeftModel:
    model = get_peft_model(llama(**SMALL, **architecture), config(**options)).eval()
    for _ in range(perturbations):
        perturb(model)
    return model


def contents(folder: Path) -> dict[str, bytes | None]:
    files = {name: current(folder, name) for name in NAMES}
    return {name: file.read_bytes() if file.is_file() else None for name, file in files.items()}


class Case:
    """One artifact that is to replace another one, or nothing."""

    def __init__(self, root: Path, old: PeftModel | None, new: PeftModel) -> None:
        self.models = {"old": old, "new": new}
        self.start, self.folder, done = root / "start", root / "folder", root / "done"
        self.start.mkdir(parents=True)
        (self.start / "README.md").write_text("---\nlicense: mit\n---\nMy words.\n")
        (self.start / "tokenizer.json").write_text("{}")
        if old is not None:
            old.save_pretrained(self.start)
        shutil.copytree(self.start, done)
        begin = time.perf_counter()
        new.save_pretrained(done)
        self.seconds = time.perf_counter() - begin
        self.seen: set[tuple[Any, ...]] = set()
        self.known = {"old": contents(self.start), "new": contents(done)}

    def save(self, model: str = "new") -> None:
        self.models[model].save_pretrained(self.folder)  # type: ignore[union-attr]

    def reset(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.start, self.folder)

    def is_there(self, which: str) -> bool:
        """Whether our loader and PEFT's find this artifact to the bit."""
        model = self.models[which]
        if model is None:
            with contextlib.suppress(ValueError):
                AutoLottaLoraModelForCausalLM.from_pretrained(self.folder)
                return False
            return True
        base = type(model.get_base_model())(model.config)
        found = [
            AutoLottaLoraModelForCausalLM.from_pretrained(self.folder),
            PeftModel.from_pretrained(base, self.folder),
        ]
        expected = model.state_dict()
        states = [again.state_dict() for again in found]
        return all(s.keys() == expected.keys() and all(torch.equal(s[k], expected[k]) for k in s) for s in states)

    def left(self) -> str:
        """Which artifact is in the folder. Where its files are as never before, all ways of loading and saving are tried."""
        try:
            found = contents(self.folder)
            nothing = self.models["old"] is None and found[NAMES[0]] is None  # without weights it is no artifact
            which = "old" if nothing else next(name for name, known in self.known.items() if found == known)
            files = [path for path in self.folder.rglob("*") if path.is_file()]
            layout = {(re.sub("-.*/", "-/", str(path.relative_to(self.folder))), path.stat().st_size) for path in files}
            if (which, *sorted(layout)) in self.seen:
                return which
            self.seen.add((which, *sorted(layout)))
            assert self.is_there(which), which
            self.save()
            assert contents(self.folder) == self.known["new"]
            assert (self.folder / "tokenizer.json").read_text() == "{}"
        except Exception as error:
            print(
                f"{sorted(str(p.relative_to(self.folder)) for p in self.folder.rglob('*'))}: {error!r}", file=sys.stderr
            )
            return "lost"
        return which


def fork(job: Callable[[], Any]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        job()
        code = 0
    finally:
        os._exit(code)


def killed(child: int) -> bool:
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "a save failed"
    return os.WIFSIGNALED(status)


def die_before(call: int, folder: Path) -> None:
    """Kill this process before its n-th call that changes something in the folder."""
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        reads = event == "open" and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        if event in EVENTS and not reads and str(args[0]).startswith(str(folder)):
            count()

    def fsync(descriptor: int, original: Any = os.fsync) -> None:
        count()
        original(descriptor)

    sys.addaudithook(hook)
    os.fsync = fsync


def at_points(case: Case) -> Counter[str]:
    counts: Counter[str] = Counter(old=0, new=0, lost=0)
    while True:
        case.reset()
        call = counts.total() + 1
        if not killed(fork(lambda call=call: (die_before(call, case.folder), case.save()))):
            return counts
        counts[case.left()] += 1


def at_random(case: Case, times: int, seed: int) -> Counter[str]:
    counts: Counter[str] = Counter(old=0, new=0, lost=0)
    moments = random.Random(seed)
    for _ in range(times):
        case.reset()
        child = fork(case.save)
        time.sleep(moments.uniform(0, 1.5 * case.seconds))
        os.kill(child, signal.SIGKILL)
        killed(child)
        counts[case.left()] += 1
    return counts


def together(case: Case, seconds: float) -> Counter[str]:
    """What a reader finds, and at the end what is there, while two save again and again."""
    case.reset()
    end = time.monotonic() + seconds

    def saves(which: str) -> None:
        moments = random.Random(which)
        while time.monotonic() < end:
            case.save(which)
            time.sleep(moments.choice([0, 0, 0.5]))

    children = [fork(lambda which=which: saves(which)) for which in ("old", "new")]
    counts: Counter[str] = Counter(old=0, new=0, refused=0, lost=0)
    while time.monotonic() < end or not counts.total() - counts["refused"]:  # on a slow machine, when they have ended
        try:
            state = AutoLottaLoraModelForCausalLM.from_pretrained(case.folder).state_dict()
        except OSError as error:  # saved to too often to be read
            assert "was saved to while it was loaded" in str(error)
            counts["refused"] += 1
            continue
        found = [
            which
            for which, model in case.models.items()
            if model
            and len(state) == len(model.state_dict())
            and all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=False))
        ]
        counts[found[0] if found else "lost"] += 1
    for child in children:
        assert not killed(child)
    counts[case.left()] += 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", type=int, default=0, metavar="N", help="kills at random moments")
    parser.add_argument("--points", action="store_true", help="kills before each call that changes the folder")
    parser.add_argument("--together", type=float, default=0, metavar="SECONDS", help="two saves at once")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    args = parser.parse_args()
    torch.set_num_threads(1)  # threads do not survive a fork
    logging.disable_progress_bar()
    other = {"num_hidden_layers": 1, "rms_norm_eps": 1e-3}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        cases = {
            "another backbone": Case(root / "a", artifact(1, {}), artifact(1, other, seed=43, r=2, lora_dropout=0.1)),
            "other values": Case(root / "b", artifact(1, {}), artifact(2, {})),
            "the first one": Case(root / "c", None, artifact(1, {})),
        }
        found: dict[str, Any] = {}
        if args.points:
            found["points"] = {name: at_points(cases[name]) for name in ("another backbone", "the first one")}
        if args.random:
            found["random"] = {name: at_random(case, args.random, args.seed) for name, case in cases.items()}
        if args.together:
            found["together"] = together(cases["another backbone"], args.together)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
