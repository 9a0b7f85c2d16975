"""Every command that is printed somewhere can be run as it is printed.

Those of `train_glue.py` are run in `tests/examples/test_train_glue.py`. Of the others, which take hours, the arguments
are read here; each is run with `--quick` in `test_benchmarks.py`.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tomllib
from typing import Any

import pytest
from commands import ROOT, printed, untested
from packaging.requirements import Requirement
from typer.main import get_command

from hf_lottalora_cli import app

COMMANDS = [(name, command) for name, commands in printed().items() for command in commands]


def of(*tools: str) -> list[tuple[str, list[str]]]:
    return [(name, words) for name, command in COMMANDS if (words := shlex.split(command))[0] in tools]


def refused(commands: list[str]) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", ROOT / "tests" / "helpers" / "commands.py"],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_there_are_commands() -> None:
    assert {name for name, _ in COMMANDS} >= {"CONTRIBUTING.md", "docs/install.md", "examples/train_glue.py"}
    assert len(of("python")) > 40 and len(of("torchrun")) >= 2 and len(of("accelerate")) >= 2 and len(of("make")) > 5


def test_shell_blocks_have_nothing_else() -> None:
    assert untested() == []


def test_targets_of_make_are_there() -> None:
    for name, words in of("make"):
        done = subprocess.run([*words, "--dry-run"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, (name, words, done.stderr)


@pytest.mark.smoke
def test_scripts_take_the_arguments_that_are_printed_with_them() -> None:
    dry = subprocess.run(["make", "--dry-run", "reproduce"], cwd=ROOT, capture_output=True, text=True, check=True)
    reproduced = [line for line in dry.stdout.splitlines() if "benchmarks/" in line]
    assert len(reproduced) > 20
    commands = [
        shlex.join(words)
        for _, words in of("python")
        if len(words) > 1 and words[1] != "-m" and "train_glue.py" not in words[1]
    ]
    wrong = ["python benchmarks/paper/mnist.py --no_such 1", "python examples/train_clm.py --no_such 1"]
    wrong += ["python benchmarks/paper/cli.py --r 1"]  # would be found
    found = refused([*dict.fromkeys([*commands, *reproduced]), *wrong]).splitlines()
    assert found[0].startswith(f"{wrong[0]}: SystemExit(2)")
    assert "--no_such" in next(line for line in found if line.startswith(f"{wrong[1]}: "))
    assert found[-1] == f"{wrong[2]}: read no arguments" and not any("benchmarks" in line for line in found[1:-1])


def test_commands_of_ours_take_the_arguments_that_are_printed_with_them() -> None:
    ours: Any = get_command(app)
    examples = [line for command in ours.commands.values() for line in command.help.splitlines()]
    examples = [shlex.split(line) for line in examples if line.strip().startswith("lottalora ")]
    wrong = ["lottalora", "inspect", "here", "--no-such"]  # would be found
    found = []
    for words in [*(words for _, words in of("lottalora") if len(words) > 1), *examples, wrong]:
        _, name, *arguments = [words[0], *words[3:]] if words[1] == "--import" else words
        try:
            ours.commands[name].make_context(name, arguments)
        except Exception as error:  # of click, or of the copy of it that typer has
            found.append((name, str(error)))
    assert len(examples) > 12 and [name for name, _ in found] == ["inspect"] and "--no-such" in found[0][1]


def test_what_pip_installs_is_in_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    names = {Requirement(line).name for lines in (project["dependencies"], *extras.values()) for line in lines}
    assert of("pip")
    for _, (_, install, what) in of("pip"):
        assert install == "install" and what in {".", *(f".[{extra}]" for extra in extras), *names}, what
