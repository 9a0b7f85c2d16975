"""`fuzz.py` sees what is bad, and finds nothing of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import fuzz
import pytest
from fuzz_artifacts import Made, make
from fuzz_mutations import MUTATIONS, Place


@pytest.mark.smoke
def test_no_case_fails(tmp_path: Path) -> None:
    """In a process of its own: it forks, for which it must have one thread."""
    out = tmp_path / "fuzz.json"
    few = ["--cases", "150"]
    command = [sys.executable, fuzz.__file__, "--workers", "2", "--json", str(out), *few]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"
    cases = json.loads(out.read_text())["cases"]
    assert len(cases) == 150 and len({one["kind"] for one in cases}) > 30
    assert {one["verdict"] for one in cases} == {"same", "refused"}


def _listing(folder: Path) -> dict[str, Any]:
    found = {}
    for file in folder.iterdir():
        facts = file.lstat()
        whole = stat.S_ISREG(facts.st_mode) and facts.st_size < 1 << 20
        link = os.readlink(file) if file.is_symlink() else None
        found[file.name] = (facts.st_mode, facts.st_size if not whole else file.read_bytes(), link)
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make("tied lora", tmp_path_factory.mktemp("made"))


@pytest.mark.parametrize("kind", MUTATIONS)
def test_each_kind_changes_the_folder(kind: str, made: Made, tmp_path: Path) -> None:
    said = set()
    for seed in range(8):
        place = Place(tmp_path / str(seed) / "artifact", made.twin, made.twin)
        shutil.copytree(made.folder, place.folder)
        before = _listing(place.folder)
        said.add(MUTATIONS[kind](Random(seed), place))
        assert _listing(place.folder) != before
    assert all(said)


FINE: dict[str, Any] = {
    "class": ["PeftModel"], "trainable": ["a", "b"], "tensors": {"a": "1", "b": "2"}, "output": "3", "training": "4",
}  # fmt: skip
ERROR = {"error": "ValueError: no", "in": "hf_lottalora.artifact.files", "ours": True, "changed": []}


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (FINE, "same"),
        ({**FINE, "training": "5"}, "training"),
        ({**FINE, "output": "5"}, "different"),
        ({**FINE, "class": ["Other"]}, "different"),
        ({**FINE, "trainable": ["a"]}, "different"),
        ({**FINE, "tensors": {"a": "1"}}, "different"),
        ({"does not run": ERROR}, "different"),
        (ERROR, "refused"),
        ({**ERROR, "ours": False}, "foreign"),
        ({**ERROR, "changed": ["a"]}, "changed"),
        ({**ERROR, "ours": False, "error": "RuntimeError: can't allocate memory"}, "memory"),
        ({"lost": "hang"}, "hang"),
        ({"lost": "the process ended with status 11"}, "foreign"),
    ],
)
def test_verdicts(answer: dict[str, Any], verdict: str) -> None:
    assert fuzz.judged(answer, [FINE])[0] == verdict


def test_either_of_two_whole_artifacts_is_the_same() -> None:
    other = {**FINE, "output": "9"}
    assert fuzz.judged(other, [FINE, other])[0] == "same"
    assert fuzz.judged({**other, "class": []}, [FINE, other])[0] == "different"


def _memory() -> dict[str, Any]:
    return {"length": len(bytearray(1 << 36))}


def _crash() -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def _asks() -> dict[str, Any]:
    return {"answer": input()}


def _waits() -> dict[str, Any]:
    time.sleep(60)
    return {}


def test_children_are_limited_and_their_ends_told_apart() -> None:
    jobs = {"memory": _memory, "crash": _crash, "asks": _asks, "waits": _waits, "fine": lambda: FINE}
    start = time.monotonic()
    ends = {name: fuzz.judged(answer, [FINE]) for name, answer in fuzz.in_children(jobs.items(), 2, seconds=2.0)}
    assert time.monotonic() - start < 30
    assert {name: verdict for name, (verdict, _) in ends.items()} == {
        "memory": "memory", "crash": "foreign", "asks": "foreign", "waits": "hang", "fine": "same",
    }  # fmt: skip
    assert "EOFError" in ends["asks"][1]


def test_a_case_is_the_same_with_and_without_the_others() -> None:
    kind = "weights: renamed, missing or added"
    some = [case for _, case in zip(range(3), fuzz.cases(5, [kind]), strict=False)]
    every = {case.number: case for _, case in zip(range(1000), fuzz.cases(5, MUTATIONS), strict=False)}
    assert all(every[case.number] == case and case.kind == kind for case in some)
    assert [case.number for case in some] != [0, 1, 2]
