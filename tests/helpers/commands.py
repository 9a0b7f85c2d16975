"""Every command that the documentation prints: in shell blocks, in code within a line, in docstrings of scripts.

As a script: reads commands as JSON, and prints those whose script does not take their arguments. Nothing is run but
what comes before the arguments are read.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

from pages import PAGES, ROOT, blocks, name
from transformers import HfArgumentParser

TOOLS = ("python", "torchrun", "accelerate", "make", "pip", "lottalora")


def _words(lines: list[str]) -> list[list[str]]:
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


def _commands(lines: list[str]) -> list[str]:
    return [shlex.join(words) for words in _words(lines) if words[0] in TOOLS]


def shell(page: Path) -> list[str]:
    """The lines of a page's shell blocks."""
    return [line for block in blocks(page) if block.language == "sh" for line in block.code.splitlines()]


def untested() -> list[list[str]]:
    """Commands in shell blocks that are of no tool whose arguments are tested."""
    return [words for page in PAGES for words in _words(shell(page)) if words[0] not in TOOLS]


def printed() -> dict[str, list[str]]:
    """Commands by the file that prints them, as shell words."""
    found = {}
    for page in PAGES:
        rest = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        inline = [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", rest)]
        found[name(page)] = _commands([*shell(page), *inline])
    for script in sorted([*(ROOT / "examples").glob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]):
        docstring = ast.get_docstring(ast.parse(script.read_text())) or ""
        lines = [line[4:] for line in docstring.splitlines() if line.startswith("    ")]
        inline = [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", docstring)]
        found[str(script.relative_to(ROOT))] = _commands([*lines, *inline])
    return {file: commands for file, commands in found.items() if commands}


class _Parsed(BaseException):
    pass


def main() -> None:
    original = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        original(self, *args, **kwargs)
        raise _Parsed

    def parse_args_into_dataclasses(self: HfArgumentParser, *args: Any, **kwargs: Any) -> Any:
        into_dataclasses(self, *args, **kwargs)
        raise _Parsed

    into_dataclasses = HfArgumentParser.parse_args_into_dataclasses
    HfArgumentParser.parse_args_into_dataclasses = parse_args_into_dataclasses  # type: ignore[method-assign]
    argparse.ArgumentParser.parse_args = parse_args  # type: ignore[method-assign, assignment]
    for command in json.load(sys.stdin):
        _, script, *sys.argv[1:] = shlex.split(command)
        sys.argv[0] = script
        sys.path.insert(0, str((ROOT / script).parent))
        errors = io.StringIO()
        try:
            with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
                runpy.run_path(str(ROOT / script), run_name="__main__")
            print(f"{command}: read no arguments")
        except _Parsed:
            pass
        except BaseException as error:
            print(f"{command}: {error!r} {errors.getvalue()[-500:]}")


if __name__ == "__main__":
    main()
