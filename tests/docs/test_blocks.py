"""The pages' code runs: each page's from top to bottom, in one namespace, in an empty folder, with `stand_ins`.

- `python` is run, but for what only a GPU runs: it says so in a comment before it, `<!-- gpu: the reason -->`, and
  is compiled.
- `text` directly after it is what it prints or raises, as in a doctest: `...` stands for anything.
- `sh` holds commands, which take hours or install something; `test_commands.py` reads their arguments.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import stand_ins
import torch
from hub import Hub
from pages import PAGES, Block, blocks, name

RUN = [page for page in PAGES if any(block.language == "python" for block in blocks(page))]
# Pages that take several seconds: `make smoke` runs them.
SLOW = {"causal-lm", "images", "paper", "quickstart", "seq2seq", "share", "speech", "text-classification"}


def run(code: list[Block]) -> None:
    """Run the blocks of a page; errors show its lines."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block, after in zip(code, [*code[1:], None], strict=True):
        if block.language != "python":
            continue
        source = "\n" * block.line + stand_ins.shorter(block.code)
        program = compile(source, str(block.page), "exec", dont_inherit=True)
        if block.gpu:
            continue
        expected = after.code if after and after.language == "text" else None
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            try:
                exec(program, namespace)
            except Exception as error:
                if not expected or f"{type(error).__name__}:" not in expected:
                    raise
                print(f"{type(error).__name__}: {error}")
        _check(expected, printed.getvalue(), f"{name(block.page)}, line {block.line + 1}")


def _check(expected: str | None, printed: str, where: str) -> None:
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    same = expected is None or doctest.OutputChecker().check_output(expected, printed, options)
    assert same, f"{where} prints\n{printed}"


@pytest.fixture
def as_it_was() -> Iterator[None]:
    """Random states and torch's settings of the process."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    dtype, threads, gradients = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    torch.set_grad_enabled(gradients)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
@pytest.mark.filterwarnings("ignore:redraw='targets' draws over weights that were loaded:UserWarning")  # images.md
@pytest.mark.parametrize(
    "page", [pytest.param(page, id=page.stem, marks=[pytest.mark.smoke] * (page.stem in SLOW)) for page in RUN]
)
def test_code_runs(page: Path, hub: Hub, as_it_was: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.tokens["hf_user"] = "your-name"
    hub.repos |= stand_ins.repositories(page.read_text())
    monkeypatch.setattr(datasets, "load_dataset", stand_ins.load)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    stand_ins.write_files(tmp_path)
    run(blocks(page))


def test_every_block_is_of_a_kind_that_is_tested() -> None:
    for page in PAGES:
        found = blocks(page)
        assert len(found) * 2 == sum(line.lstrip().startswith("```") for line in page.read_text().splitlines()), page
        assert {block.language for block in found} <= {"python", "sh", "text", ""}, page


def test_every_stand_in_stands_in_for_something() -> None:
    text = "\n".join(page.read_text() for page in RUN)
    code = "".join(block.code for page in RUN for block in blocks(page) if block.language == "python")
    assert all(name in text for name in (*stand_ins.MODELS, *stand_ins.DATASETS))
    assert all(stand_ins.re.search(printed, code) for printed in stand_ins.SHORTER)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("```python\nprint(1)\n```\n```text\n2\n```", "page.md, line 2 prints\n  1"),
        ("```python\n1 / 0\n```\n```text\nValueError: no\n```", "division by zero"),
        ("```python\na = 1\n```\n\n```python\nprint(b)\n```", "'b' is not defined"),
        ("<!-- gpu: it is fast -->\n```python\n1 +\n```", "invalid syntax"),
    ],
)
def test_what_is_wrong_is_found(text: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    monkeypatch.setattr("pages.ROOT", tmp_path)
    with pytest.raises((AssertionError, ArithmeticError, NameError, SyntaxError), match=wrong):
        run(blocks(page))
