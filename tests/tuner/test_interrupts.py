"""What a context manager changes, it restores, wherever Ctrl-C interrupts it: on its way in, within, or on its way out."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from test_reseed import same, state
from tiny import bert, config, llama, logits, perturb

from hf_lottalora import ScaffoldResampler, ScaffoldTensor, cost_report
from hf_lottalora.plan.initialization import PrivateRandomness
from hf_lottalora.scaffold import draw
from hf_lottalora.scaffold.tensor import draw_into


class Interrupter:
    """Raises KeyboardInterrupt, once, at the n-th block that is drawn; it has been drawn by then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left: int | None = None
        parallel = draw._in_parallel
        monkeypatch.setattr(draw, "_in_parallel", lambda work, jobs, threads: parallel(self.wrapped(work), jobs, 1))

    def wrapped(self, work: Callable[..., None]) -> Callable[..., None]:
        def block(*job: Any) -> None:
            work(*job)
            if self.left is not None:
                self.left -= 1
                if self.left < 0:
                    self.left = None
                    raise KeyboardInterrupt

        return block


def everything(model: PeftModel) -> list[Any]:
    """All that a context manager could change, but for the values of tensors."""
    tuner = model.base_model
    parameters = [(name, p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)]
    configs = [(name, id(config), config.seed) for name, config in model.peft_config.items()]
    plans = [(name, id(plan)) for name, plan in tuner.plans.items()]
    flags = (tuner._switched, tuner._off, tuner._layers_disabled, tuner.trained.installed, tuner.residency)
    return [parameters, configs, plans, flags, id(tuner.first_plan), id(tuner.first_config), model._adapters_disabled]


CONTEXTS: dict[str, Callable[[PeftModel], AbstractContextManager[Any]]] = {
    "scaffold_seed": lambda model: model.scaffold_seed(43),
    "scaffold_off": lambda model: model.scaffold_off(),
    "disable_adapter": lambda model: model.disable_adapter(),
}
MODELS: dict[str, Callable[[], PeftModel]] = {
    "llama": lambda: get_peft_model(llama(num_hidden_layers=1), config(embeddings="frozen")),
    "bert": lambda: get_peft_model(bert(num_hidden_layers=1), config(head="lora")),
    "packed": lambda: get_peft_model(llama(num_hidden_layers=1), config(residency="packed")),
    "streamed": lambda: get_peft_model(llama(num_hidden_layers=1), config(residency="streamed", embeddings="frozen")),
    "orthogonal": lambda: get_peft_model(llama(num_hidden_layers=1), config(family="orthogonal")),
}


@pytest.mark.parametrize("build", MODELS)
@pytest.mark.parametrize("context", CONTEXTS)
def test_ctrl_c_at_any_draw(context: str, build: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS[build]()
    model.add_adapter("frozen", config(**{**_options(model), "inference_mode": True}))
    perturb(model)
    before, expected, found = state(model), logits(model), everything(model)
    interrupter = Interrupter(monkeypatch)
    for at in range(1000):
        interrupter.left = at
        try:
            with CONTEXTS[context](model):
                pass
            done = interrupter.left is not None  # it ended before
        except KeyboardInterrupt:
            done = False
        interrupter.left = None
        assert same(state(model), before) and everything(model) == found, at
        if done:
            break
    assert done and torch.equal(logits(model), expected)
    model.verify_scaffold(full=True)


def _options(model: PeftModel) -> dict[str, Any]:
    made = model.peft_config["default"]
    return {name: getattr(made, name) for name in ("embeddings", "head", "family", "residency")}


@pytest.mark.parametrize("context", CONTEXTS)
def test_ctrl_c_within(context: str) -> None:
    model = MODELS["bert"]()
    before, found = state(model), everything(model)
    with pytest.raises(KeyboardInterrupt), CONTEXTS[context](model):
        raise KeyboardInterrupt
    assert same(state(model), before) and everything(model) == found


def test_a_switch_for_good_is_made_or_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS["llama"]()
    resampler = ScaffoldResampler(model, "step")
    before, found = state(model), everything(model)
    interrupter = Interrupter(monkeypatch)
    for at in (0, 3):
        for act in (lambda: model.set_scaffold_seed(43), resampler.resample):
            interrupter.left = at
            with pytest.raises(KeyboardInterrupt):
                act()
            assert same(state(model), before) and everything(model) == found and resampler.drawn == 0


def test_a_model_that_is_disabled_trains_nothing_that_was_frozen() -> None:
    model = MODELS["llama"]()
    model.set_requires_grad("default", False)
    with model.disable_adapter():
        pass
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with model.disable_adapter():
        model.set_adapter("default")  # a choice of its own
    assert any(parameter.requires_grad for parameter in model.parameters())


def test_the_other_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt), PrivateRandomness():
        torch.rand(3)
        raise KeyboardInterrupt
    assert torch.equal(torch.get_rng_state(), generator)
    model = MODELS["llama"]()
    found = everything(model)

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.func, "functional_call", interrupted)
    x = torch.arange(3, 9)[None]
    with pytest.raises(KeyboardInterrupt):
        cost_report(model, {"input_ids": x, "labels": x})
    assert everything(model) == found and model.get_model_status().enabled


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt here, whatever a library has made of it in this process."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_other_threads_have_ended_when_a_draw_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else they would fill what is restored by then."""
    started, drawn, block = threading.Event(), [0], draw._draw_block

    def slow(*job: Any) -> None:
        if threading.current_thread() is not threading.main_thread() and not started.is_set():
            started.set()
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # which waits
        threading.Event().wait(0.02)
        block(*job)
        drawn[0] += 1

    monkeypatch.setattr(draw, "_draw_block", slow)
    spec = ScaffoldTensor("a", (1 << 10, 1 << 11), 1)
    target = torch.zeros(spec.shape)
    with pytest.raises(KeyboardInterrupt):
        draw_into({spec: target}, threads=2)
    count, left = drawn[0], target.clone()
    threading.Event().wait(0.2)
    assert drawn[0] == count and torch.equal(left, target)
    assert not torch.equal(target, spec.draw())
