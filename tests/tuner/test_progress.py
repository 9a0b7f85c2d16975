"""A bar for what takes seconds, and none for anything else, or where the user has switched them off."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import bert, config, llama, logits
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from hf_lottalora import AutoLottaLoraModelForCausalLM, ResampleScaffoldCallback, ScaffoldTensor
from hf_lottalora.scaffold.tensor import draw_into
from hf_lottalora.tuner import progress as module
from hf_lottalora.tuner.progress import progress, silent

FAMILY = {"family_pattern": {"mlp.down_proj": "orthogonal"}}  # some is drawn by linear algebra


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DELAY_SECONDS", 0)


@pytest.fixture(autouse=True)
def switches_as_found() -> Iterator[None]:
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    yield
    logging.set_verbosity(verbosity)
    (logging.enable_progress_bar if bars else logging.disable_progress_bar)()


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def bars(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, list[int]]]:
    """What each bar says, its total, and the numbers it has been told."""
    made: list[tuple[str, int, list[int]]] = []

    class Bar:
        def __init__(self, desc: str, total: int, initial: int, **options: Any) -> None:
            made.append((desc, total, [initial]))
            self.told = made[-1][2]

        def update(self, count: int) -> None:
            self.told.append(count)

        def close(self) -> None:
            pass

    monkeypatch.setattr(logging, "tqdm", Bar)
    return made


def test_it_shows_after_a_while_and_goes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    monkeypatch.setattr(module, "monotonic", clock)
    with progress("Drawing the scaffold", 1_000_000) as done:
        clock.now += 1.4
        done(200_000)
        assert capsys.readouterr().err == ""
        clock.now += 0.2
        done(300_000)
        shown = capsys.readouterr().err
        assert "Drawing the scaffold:  50%" in shown and "500k/1.00M" in shown
    assert "\n" not in capsys.readouterr().err  # the line is given back


def test_what_is_quick_makes_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    made = bars(monkeypatch)
    model = get_peft_model(llama(), config())
    model.set_scaffold_seed(43)
    model.verify_scaffold(full=True)
    assert made == []


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("options", [{}, FAMILY, {"residency": "packed"}, {"embeddings": "lora"}])
def test_every_value_that_is_drawn_is_counted(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = bars(monkeypatch)
    ignored = {"Changing the residency"} if options.get("residency") else set()  # looked at whenever adapters switch

    def seen(action: Callable[[], Any]) -> dict[str, int]:
        made.clear()
        action()
        assert all(sum(told) == total for _, total, told in made)
        return {what: total for what, total, _ in made if what not in ignored}

    model: Any = None

    def make() -> None:
        nonlocal model
        model = get_peft_model(llama(), config(**options))

    drawn = seen(make)
    plan = model.get_plan()
    scaffold = sum(spec.numel for spec in plan.scaffold.values())
    starting = {t.path: t.survey.numel for t in plan.with_role("trained") if isinstance(t.start, ScaffoldTensor)}
    expected = {"Drawing the scaffold": scaffold}
    assert drawn == expected | ({"Drawing starting values": sum(starting.values())} if starting else {})
    model.save_pretrained(tmp_path)
    assert seen(lambda: AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path)) == expected
    assert seen(lambda: model.verify_scaffold(full=True)) == {"Verifying the scaffold": scaffold}
    if not options:
        assert seen(lambda: model.set_scaffold_seed(43)) == {"Drawing the scaffold": scaffold}
        assert seen(lambda: model.set_residency("packed")) == {"Changing the residency": scaffold}


OFF = {
    "transformers' progress bars": logging.disable_progress_bar,
    "transformers' verbosity": logging.set_verbosity_error,
}


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("switch", [*OFF, "another rank", "within silent()", None])
def test_switches(
    switch: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    saved: tuple[PeftModel, Path],
) -> None:
    capsys.readouterr()
    if switch in OFF:
        OFF[switch]()
    elif switch == "another rank":
        monkeypatch.setenv("LOCAL_RANK", "1")
    load = AutoLottaLoraModelForCausalLM.from_pretrained
    if switch == "within silent()":
        with silent():
            model = load(saved[1])
    else:
        model = load(saved[1])
    assert ("Drawing the scaffold" in capsys.readouterr().err) == (switch is None)
    assert torch.equal(logits(model), logits(saved[0]))


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_none_while_a_trainer_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disable_tqdm: bool) -> None:
    model = get_peft_model(bert(), config(task_type="SEQ_CLS"))
    made = bars(monkeypatch)
    data = [{"input_ids": torch.arange(3, 9), "labels": i % 2} for i in range(8)]
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=disable_tqdm,
        save_strategy="no",
    )
    Trainer(model=model, args=args, train_dataset=data, callbacks=[ResampleScaffoldCallback("step")]).train()  # type: ignore[arg-type]
    assert made == []


def test_blocks_are_counted_by_every_thread() -> None:
    spec, odd = ScaffoldTensor("a", (1500, 1001), 1), ScaffoldTensor("b", (33, 77), 1, zero_row=0)
    out = {spec: torch.empty(spec.shape), odd: torch.empty(odd.shape)}
    counts, threads = [], set()

    def done(count: int) -> None:
        counts.append(count)
        threads.add(threading.get_ident())

    draw_into(out, threads=2, done=done)
    assert sum(counts) == spec.numel + odd.numel and len(counts) > 2 and len(threads) <= 2
    assert all(torch.equal(tensor, scaffold.draw()) for scaffold, tensor in out.items())


@pytest.mark.usefixtures("at_once")
def test_silence_ends_where_it_began(capsys: pytest.CaptureFixture[str]) -> None:
    with silent():
        with silent():
            pass
        with progress("Drawing", 10) as done:
            done(5)
    assert capsys.readouterr().err == ""
    with progress("Drawing", 10) as done:
        done(5)
    assert "Drawing:  50%" in capsys.readouterr().err


@pytest.mark.usefixtures("at_once")
def test_an_error_closes_the_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="half way"), progress("Drawing", 10) as done:
        done(5)
        raise RuntimeError("half way")
    assert capsys.readouterr().err.endswith("\r")
