"""State dicts of whole models, as torch.save, Accelerate and weight averaging use them, in every residency."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import PeftModel, get_peft_model
from tiny import config, llama, logits, perturb
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from hf_lottalora import AutoLottaLoraModelForCausalLM
from hf_lottalora.residency.forms import VirtualWeight

MODES = ["dense", "packed", "int4", "streamed"]


def made(mode: str = "dense", adapter_name: str = "default", **options: Any) -> PeftModel:
    options = {"embeddings": "frozen", "family": "binary", "residency": mode, **options}
    model = get_peft_model(llama(), config(**options), adapter_name=adapter_name)
    perturb(model)
    return model.eval()


@pytest.mark.parametrize("mode", MODES)
def test_a_file_loads_into_any_residency(mode: str, tmp_path: Path) -> None:
    model = made(mode)
    expected = logits(model)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    if mode != "dense":  # of the scaffold there is what to draw; shared by the tied head
        values = sum(spec.numel for spec in model.get_plan().scaffold.values())
        assert (tmp_path / "model.pt").stat().st_size < 4 * values
        state = model.state_dict()
        tied = [state[f"base_model.model.{name}.weight"] for name in ("lm_head", "model.embed_tokens")]
        assert tied[0] is tied[1] and not any(isinstance(value, VirtualWeight) for value in state.values())
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    for other in MODES:
        again = made(other, adapter_seed=5)
        assert again.load_state_dict(state).missing_keys == []
        assert again.residency == other and again.state_dict().keys() == state.keys()
        again.verify_scaffold(full=True)
        again.set_residency("dense")
        torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-5)
        if mode == other != "int4":
            assert torch.equal(logits(again), expected)


def test_a_file_is_read_without_this_package(tmp_path: Path) -> None:
    torch.save(made("packed").state_dict(), tmp_path / "model.pt")
    code = f"import torch; print(len(torch.load({str(tmp_path / 'model.pt')!r}, weights_only=True)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(found.stdout) == len(made().state_dict())


@pytest.mark.parametrize("mode", MODES)
def test_a_base_models_own_state_dict(mode: str, tmp_path: Path) -> None:
    """It does not pass the tuner, and has the weights themselves: as tensors they load into any model."""
    model, plain = made(mode), llama()
    state = model.get_base_model().state_dict()
    torch.save(state, tmp_path / "base.pt")
    state = torch.load(tmp_path / "base.pt", weights_only=True)
    plain.model.embed_tokens.load_state_dict({"weight": state["model.embed_tokens.weight"]})
    made("dense").get_base_model().load_state_dict(state)
    assert torch.equal(plain.model.embed_tokens.weight, model.get_plan().scaffold["model.embed_tokens.weight"].draw())


@pytest.mark.parametrize("into", ["dense", "packed"])
@pytest.mark.parametrize("mode", MODES)
def test_another_scaffold_is_refused_before_anything_is_loaded(mode: str, into: str) -> None:
    for options in ({"seed": 7}, {"family": "ternary"}):
        state, model = made(mode, **options).state_dict(), made(into, adapter_seed=3)
        before = cloned(model)
        with pytest.raises(
            ValueError, match=r"The state dict has .* where this model has 'model.*of seed 42, family 'b"
        ):
            model.load_state_dict(state)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.set_scaffold_seed(7)
    model.load_state_dict(made(mode, seed=7).state_dict())


def test_a_family_that_was_changed_since_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    state, model = made("packed").state_dict(), made("packed")
    monkeypatch.setattr("hf_lottalora.residency.recipe.FORMAT_VERSION", 2)
    with pytest.raises(ValueError, match="was saved as format 1 of family 'binary', which draws other values here"):
        model.load_state_dict(state)


def cloned(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("mode", MODES)
def test_contexts_and_casts_round_trip(mode: str) -> None:
    model = made(mode)

    def check() -> None:
        expected, state = logits(model), cloned(model)
        perturb(model)
        model.load_state_dict(state)
        assert torch.equal(logits(model), expected)

    with model.scaffold_seed(9):
        check()
    with model.scaffold_off():
        check()
    model.half().float()
    check()
    recipes = cloned(made("packed"))
    if mode == "dense":  # where it was rounded: what is loaded repairs it
        model.load_state_dict(recipes)
        model.verify_scaffold(full=True)


@pytest.mark.filterwarnings("ignore:.*Removed shared tensor")
@pytest.mark.parametrize(("adapter_name", "safe"), [("default", False), ("other", True)])
@pytest.mark.parametrize("mode", MODES)
def test_accelerate(mode: str, adapter_name: str, safe: bool, tmp_path: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # another test's may have had other settings
    # Older releases of safetensors compare shapes before a model is asked: no recipe is loaded for a dense weight there.
    for into in MODES if not safe else [other for other in MODES if (other == "dense") == (mode == "dense")]:
        accelerator = Accelerator(cpu=True)
        model = made(mode, adapter_name)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        model, optimizer = accelerator.prepare(model, optimizer)
        model.base_model.set_residency("dense")
        expected = logits(model)
        model.base_model.set_residency(mode)
        accelerator.save_state(str(tmp_path / into), safe_serialization=safe)
        model.set_residency(into)
        perturb(model)
        accelerator.load_state(str(tmp_path / into))
        assert model.residency == into
        model.set_residency("dense")
        assert torch.equal(logits(model), expected)


AVERAGES = {
    "swa": {},
    "swa, several at once": {"multi_avg_fn": get_swa_multi_avg_fn()},
    "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
    "ema with buffers": {"multi_avg_fn": get_ema_multi_avg_fn(0.9), "use_buffers": True},
}


@pytest.mark.parametrize("name", AVERAGES)
@pytest.mark.parametrize("mode", MODES)
def test_averaged_models(mode: str, name: str, tmp_path: Path) -> None:
    results = []
    for held in ("dense", mode):
        model = made(held)
        averaged = AveragedModel(model, **AVERAGES[name])
        for _ in range(3):
            averaged.update_parameters(model)
            perturb(model)
        averaged.module.verify_scaffold(full=True)
        assert averaged.module.residency == held
        results.append({n: p for n, p in averaged.named_parameters() if p.requires_grad})
    assert all(torch.equal(value, results[1][key]) for key, value in results[0].items())
    live = dict(model.named_parameters())["base_model.model.model.norm.weight"]
    assert not torch.equal(results[1]["module.base_model.model.model.norm.weight"], live)
    averaged.module.save_pretrained(tmp_path)
    again = AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again), logits(averaged.module))
    state, other = averaged.state_dict(), AveragedModel(made("streamed"))
    other.load_state_dict(state)
    torch.testing.assert_close(logits(other.module), logits(averaged.module), rtol=1e-4, atol=1e-5)


def test_an_average_that_rounds_the_scaffold_says_what_to_do(tmp_path: Path) -> None:
    """decay * W + (1 - decay) * W is W only up to rounding."""
    model = made()
    averaged = AveragedModel(model, avg_fn=get_ema_avg_fn(0.9))
    for _ in range(3):
        averaged.update_parameters(model)
    with pytest.raises(
        ValueError, match=r"is not what seed 42 draws.* averaged.* set_scaffold_seed\(42\) draws it again"
    ):
        averaged.module.save_pretrained(tmp_path)
    averaged.module.set_scaffold_seed(42)
    averaged.module.save_pretrained(tmp_path)
    model = made("packed")
    averaged = AveragedModel(model, avg_fn=get_ema_avg_fn(0.9))
    averaged.update_parameters(model)
    with pytest.raises(RuntimeError, match="would write to a scaffold weight that is not in memory"):
        averaged.update_parameters(model)


def test_values_are_no_recipe() -> None:
    weight = next(p for p in made("packed").parameters() if isinstance(p, VirtualWeight))
    with torch.no_grad():
        weight.copy_(weight.dense())  # what it is already
        weight.lerp_(weight, 0.5)
        with pytest.raises(RuntimeError, match="would write to a scaffold weight"):
            weight.copy_(weight.dense() + 1)
        with pytest.raises(RuntimeError, match="would write to a scaffold weight"):
            weight.lerp_(torch.zeros(weight.shape), 0.5)
        with pytest.raises(RuntimeError, match="would write to a scaffold weight"):
            torch._foreach_lerp_([torch.zeros(2), weight], [torch.ones(2), torch.zeros(weight.shape)], 0.5)
