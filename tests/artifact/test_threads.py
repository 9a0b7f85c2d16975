"""Several threads load artifacts, make models and build plain layers at once, as a server does."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from tiny import bert, config, llama, logits, perturb, vit
from torch import nn
from transformers import LlamaForCausalLM
from transformers.initialization import TORCH_INIT_FUNCTIONS, TORCH_MODULES_TO_PATCH

from hf_lottalora import (
    AutoLottaLoraModelForCausalLM,
    AutoLottaLoraModelForImageClassification,
    AutoLottaLoraModelForSequenceClassification,
)


def process_wide() -> dict[str, Any]:
    """What loaders of other packages exchange for every thread while they build."""
    found: dict[str, Any] = {"default dtype": torch.get_default_dtype(), "rng": torch.get_rng_state().tolist()}
    owners: list[Any] = [nn.Module, nn.Linear, transformers.PreTrainedModel]
    for owner in owners:
        found |= {f"{owner.__name__}.{name}": value for name, value in vars(owner).items() if callable(value)}
    for module in (sys.modules[name] for name in TORCH_MODULES_TO_PATCH):
        found |= {f"{module.__name__}.{n}": getattr(module, n) for n in TORCH_INIT_FUNCTIONS if hasattr(module, n)}
    return {**found, **{name: getattr(torch, name) for name in ("empty", "zeros", "ones", "full", "linspace")}}


@pytest.fixture
def frequent_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def two(tmp_path: Path) -> list[tuple[Any, Path, torch.Tensor]]:
    """Loader, folder and logits of two artifacts, of which one is in half precision."""
    result = []
    for loader, model in (
        (AutoLottaLoraModelForCausalLM, get_peft_model(llama(), config())),
        (AutoLottaLoraModelForSequenceClassification, get_peft_model(bert().to(torch.bfloat16), config())),
    ):
        perturb(model)
        folder = tmp_path / loader.__name__
        model.save_pretrained(folder)
        result.append((loader, folder, logits(model)))
    return result


def at_once(*jobs: Callable[[], Any]) -> list[Any]:
    """The results of the jobs, each of which a thread begins at the same moment."""
    start = threading.Barrier(len(jobs))

    def run(job: Callable[[], Any]) -> Any:
        start.wait()
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(run, jobs))


@pytest.mark.usefixtures("frequent_switches")
def test_loading_in_many_threads(two: list[tuple[Any, Path, torch.Tensor]]) -> None:
    before = process_wide()

    def load(loader: Any, folder: Path, expected: torch.Tensor) -> bool:
        return all(torch.equal(logits(loader.from_pretrained(folder)), expected) for _ in range(2))

    def make() -> torch.Tensor:
        return logits(get_peft_model(base.pop(), config(init_lora_weights=False)))

    base = [llama() for _ in range(3)]
    expected = logits(get_peft_model(llama(), config(init_lora_weights=False)))
    before["rng"] = torch.get_rng_state().tolist()
    loaded = at_once(*(lambda case=case: load(*case) for case in two * 2), make, make, make)
    assert loaded[:4] == [True] * 4
    assert all(torch.equal(made, expected) for made in loaded[4:])
    assert process_wide() == before


@pytest.mark.usefixtures("frequent_switches")
def test_layers_that_others_build_meanwhile_are_as_ever(two: list[tuple[Any, Path, torch.Tensor]]) -> None:
    loader, folder, expected = two[0]
    loading = [True]

    def load() -> PeftModel:
        try:
            return loader.from_pretrained(folder)
        finally:
            loading.pop()

    def build() -> list[str]:
        wrong, built = [], 0
        while loading or not built:
            built += 1
            weight = nn.Linear(64, 8).weight
            if weight.is_meta or weight.dtype != torch.float32 or not 0.05 < weight.abs().max() <= 0.125:
                wrong.append(f"layer {built}: {weight}")
        return wrong

    before = process_wide()
    model, *wrong = at_once(load, build, build)
    assert wrong == [[], []]
    assert torch.equal(logits(model), expected)
    before["rng"] = torch.get_rng_state().tolist()  # the layers were drawn from it
    assert process_wide() == before


def test_what_is_drawn_elsewhere_meanwhile_is_not_undone(
    saved: tuple[PeftModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.tuners_utils import BaseTuner

    inject, seen = BaseTuner.inject_adapter, []

    def and_another_thread_draws(*args: Any, **kwargs: Any) -> None:
        inject(*args, **kwargs)
        with ThreadPoolExecutor(1) as pool:
            seen.append(pool.submit(torch.rand, 3).result())

    monkeypatch.setattr(BaseTuner, "inject_adapter", and_another_thread_draws)
    AutoLottaLoraModelForCausalLM.from_pretrained(saved[1])
    assert not torch.equal(torch.rand(3), seen[0])


def test_constructors_that_draw_do_not_move_the_generator(tmp_path: Path) -> None:
    get_peft_model(vit(), config()).save_pretrained(tmp_path)  # its position embeddings are torch.randn
    before = torch.get_rng_state()
    AutoLottaLoraModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_load_that_fails_leaves_nothing_behind(
    saved: tuple[PeftModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = process_wide()

    init = LlamaForCausalLM.__init__

    def broken(self: LlamaForCausalLM, architecture: Any) -> None:
        init(self, architecture)
        assert self.lm_head.weight.is_meta
        during = process_wide()
        assert [key for key in before if during[key] != before[key]] == []
        raise RuntimeError("half way")

    with monkeypatch.context() as patched, pytest.raises(ValueError, match="found RuntimeError: half way"):
        patched.setattr(LlamaForCausalLM, "__init__", broken)
        AutoLottaLoraModelForCausalLM.from_pretrained(saved[1])
    assert process_wide() == before
    assert not nn.Linear(2, 2).weight.is_meta
    assert torch.equal(logits(AutoLottaLoraModelForCausalLM.from_pretrained(saved[1])), logits(saved[0]))


def test_what_is_loaded_can_be_trained_and_its_config_used_again(saved: tuple[PeftModel, Path]) -> None:
    model = AutoLottaLoraModelForCausalLM.from_pretrained(saved[1], is_trainable=True)
    again = get_peft_model(llama(), model.peft_config["default"])
    fresh = get_peft_model(llama(), config(task_type="CAUSAL_LM"))
    state = fresh.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())
    model(input_ids=torch.arange(3, 9)[None], labels=torch.arange(3, 9)[None]).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
