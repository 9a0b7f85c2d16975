"""PreLoRA: the rules by hand, what is trained in each phase, resuming to the bit, the artifact, and what is refused."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType, compare_versions
from peft import PeftModel, get_peft_model
from prelora_worker import (
    CHECKPOINTS,
    JOINT,
    LORA,
    STEPS,
    Watch,
    equal,
    losses,
    prelora,
    rows,
    run,
    trainer,
    vit,
)
from safetensors.torch import load_file, save_file
from tiny import bert, llama
from torch import nn
from transformers import Trainer, ViTForImageClassification

from hf_lottalora import LottaLoraConfig, PreLoraCallback
from hf_lottalora.experiments.prelora_rules import change, choose_ranks, converged, family_changes, family_of
from hf_lottalora.experiments.prelora_settings import planned

# Versions of transformers name the parts of a ViT differently.
LINEAR = {path: m for path, m in vit().named_modules() if isinstance(m, nn.Linear) and path != "classifier"}
TARGETS = [path for path, m in LINEAR.items() if m.in_features == m.out_features]  # of the attention
MLP = sorted(LINEAR.keys() - set(TARGETS))


# ---- the rules ----------------------------------------------------------------------------------------------------


def test_the_test_by_hand() -> None:
    losses = [1.0, 0.97, 0.95]  # changes of 3 % and 2.06 %
    norms = [{"0.q": 10.0, "1.q": 20.0, "0.v": 5.0}, {"0.q": 10.1, "1.q": 20.0, "0.v": 5.01}]
    families = {"0.q": "q", "1.q": "q", "0.v": "v"}
    changes = family_changes(*norms, families)
    assert changes == pytest.approx({"q": (0.01 + 0) / 2, "v": 0.002})
    assert converged(losses, [changes] * 2, 1, 5) and converged(losses, [changes] * 2, 0.51, 3.01)
    assert not converged(losses, [changes] * 2, 0.51, 2.99)  # the first change of the loss
    assert not converged(losses, [changes, {"q": 0.0, "v": 0.0052}], 0.51, 5)  # one family, once
    assert converged([4.0, 5.0], [{"q": 0.0}], 1, 25) and not converged(
        [4.0, 5.0], [{"q": 0.01}], 1, 25
    )  # at most; less
    assert not converged([1.0, math.nan], [{"q": 0.0}], 1, 5) and not converged([1.0, 1.0], [{"q": math.inf}], 1, 5)
    assert change(0.0, 0.0) == 0 and change(0.0, 1e-9) == math.inf and change(-2.0, -1.0) == 0.5


def test_ranks_by_hand() -> None:
    families = {"0.q": "q", "1.q": "q", "2.q": "q", "0.v": "v", "1.v": "v"}
    before = dict.fromkeys(families, 2.0)
    after = {"0.q": 2.1, "1.q": 1.8, "2.q": 2.5, "0.v": 3.0, "1.v": 3.0}  # u = 0, 1/4, 1; v changed alike
    assert choose_ranks(before, after, families, (4, 8, 16, 32)) == {"0.q": 4, "1.q": 4, "2.q": 32, "0.v": 4, "1.v": 4}
    after["1.q"] = 2.31  # u = 0.525
    assert choose_ranks(before, after, families, (4, 8, 16, 32))["1.q"] == 16
    assert choose_ranks(before, after, families, (3,)) == dict.fromkeys(families, 3)


def test_families_of_real_models() -> None:
    """An attention's output is not an MLP's, as it is by the words of the authors' script."""
    paths = [name for name, m in bert().named_modules() if isinstance(m, nn.Linear)]
    found = {family_of(path, {}) for path in paths if ".layer." in path}
    self = {f"attention.self.{name}" for name in ("query", "key", "value")}
    assert found == self | {"attention.output.dense", "intermediate.dense", "output.dense"}
    assert [family_of(path, {}) for path in ("0", "net.2", "head", "stages.1.blocks.0.conv")] == [
        "*",
        "net.*",
        "head",
        "conv",
    ]
    assert (
        family_of("a.0.q_proj", {"qk": "[qk]_proj"}) == "qk"
        and family_of("a.0.v_proj", {"qk": "[qk]_proj"}) == "v_proj"
    )
    with pytest.raises(ValueError, match="'a.0.q' matches the patterns of ..one., .other..."):
        family_of("a.0.q", {"one": "q", "other": "."})


# ---- the phases ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trainer, PreLoraCallback, Watch]:
    folder, watch = tmp_path_factory.mktemp("prelora"), Watch()
    made, callback = run(folder, callbacks=[watch])
    return folder, made, callback, watch


Whole = tuple[Path, Trainer, PreLoraCallback, Watch]


def test_exactly_what_is_trained_in_each_phase(whole: Whole) -> None:
    _, made, callback, watch = whole
    own = {name for name, _ in vit().named_parameters()}
    wrapped = {
        f"{path}.base_layer.{kind}" if path in TARGETS else f"{path}.{kind}"
        for path, _, kind in (name.rpartition(".") for name in own)
    }
    pairs = {f"{path}.lora_{role}.default.weight" for path in TARGETS for role in "AB"}
    under = {f"{path}.base_layer.{name}" for path in TARGETS for name in ("weight", "bias")}
    assert under < wrapped
    expected = {"full": own, "joint": wrapped | pairs, "lora": (wrapped - under) | pairs}
    for step, trained in watch.trained.items():
        phase = "full" if step < JOINT else "joint" if step < LORA else "lora"
        assert trained == expected[phase], step
    assert [(phase.name, phase.start) for phase in callback.report.phases] == [
        ("full", 0),
        ("joint", JOINT),
        ("lora", LORA),
    ]
    counts = {name: p.numel() for name, p in made.model.named_parameters()}
    assert callback.report.phases[-1].trained == sum(counts[name] for name in expected["lora"])
    assert callback.report.phases[-1].total == sum(counts.values())


def test_the_optimizer_forgets_what_is_frozen(whole: Whole) -> None:
    folder, made, callback, watch = whole
    full, joint, lora = (watch.moments[step] for step in (JOINT - 1, JOINT, LORA))
    for moments, phase in zip((full, joint, lora), callback.report.phases, strict=True):
        parameters = sum(1 for _ in watch.trained[phase.start])
        assert moments == 2 * phase.trained + parameters  # and a count of steps for each tensor
    assert lora < full < joint
    assert made.accelerator._optimizers == [made.optimizer] == [made.callback_handler.optimizer]
    sizes = {step: (folder / f"checkpoint-{step}" / "optimizer.pt").stat().st_size for step in (5, 8, 13)}
    assert sizes[13] < sizes[5] < sizes[8]


def test_the_schedule_goes_on_and_rises_again(whole: Whole) -> None:
    rates = [entry["learning_rate"] for entry in whole[1].state.log_history if "learning_rate" in entry]
    cosine = [1e-2 * 0.5 * (1 + math.cos(math.pi * step / STEPS)) for step in range(STEPS)]
    factors = {LORA: 1 / 3, LORA + 1: 2 / 3}
    assert rates == pytest.approx([rate * factors.get(step, 1) for step, rate in enumerate(cosine)])


def test_losses_of_windows_are_those_of_the_steps(whole: Whole) -> None:
    _, made, callback, _ = whole
    steps, windows = losses(made), callback.report.windows
    assert [window.step for window in windows] == list(range(2, STEPS + 1, 2))
    assert [w.loss for w in windows] == pytest.approx(
        [(a + b) / 2 for a, b in zip(steps[::2], steps[1::2], strict=True)]
    )
    assert windows[0].loss_change is None and windows[1].loss_change == pytest.approx(
        100 * abs(windows[1].loss - windows[0].loss) / windows[0].loss
    )
    assert (
        set(windows[1].weight_changes) == {family_of(path, {}) for path in TARGETS}
        and len(windows[1].weight_changes) == 4
    )
    assert not windows[3].weight_changes and windows[3].phase == "joint" and windows[-1].phase == "lora"
    assert len(losses(made)) == STEPS  # logging windows costs no line of Trainer's own
    logged = [entry for entry in made.state.log_history if "prelora_loss" in entry]
    assert [entry["prelora_loss"] for entry in logged] == [window.loss for window in windows]
    (found,) = [entry for entry in made.state.log_history if any(key.startswith("prelora_rank/") for key in entry)]
    ranks = [rank for path, rank in callback.report.ranks.items() if family_of(path, {}) == family_of(TARGETS[0], {})]
    assert found["step"] == JOINT and found[f"prelora_rank/{family_of(TARGETS[0], {})}"] == sum(ranks) / len(ranks)


def test_ranks_are_those_of_the_adapters(whole: Whole) -> None:
    _, _, callback, _ = whole
    plan = callback.peft_model().get_plan()
    assert {adapter.path: adapter.r for adapter in plan.adapters} == callback.report.ranks
    assert set(callback.report.ranks) == set(TARGETS) and set(callback.report.ranks.values()) == {2, 4}
    assert {adapter.scaling for adapter in plan.adapters} == {1.0} and not any(a.train_beta for a in plan.adapters)


def test_ranks_by_gradients_and_a_config_of_ones_own(tmp_path: Path) -> None:
    watch = Watch()
    made = trainer(tmp_path, callbacks=[watch], max_steps=12)
    options: dict[str, Any] = {"redraw": "none", "save_kept": True, "target_modules": MLP, "lora_alpha": 16}
    made.model.vit.embeddings.position_embeddings.requires_grad_(False)
    callback = prelora(LottaLoraConfig(seed=1, **options), rank_by="gradients", joint_steps=2).attach(made)
    made.train()
    plan = callback.peft_model().get_plan()
    assert {adapter.scaling for adapter in plan.adapters} == {2.0}
    assert sorted(adapter.path for adapter in plan.adapters) == MLP
    assert any("lora_beta" in name for name in watch.trained[JOINT]) and all(
        b != 1 for b in callback.peft_model().get_betas().values()
    )
    assert not any("position_embeddings" in name for names in watch.trained.values() for name in names)


# ---- resuming -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", CHECKPOINTS)
def test_resuming_is_going_on_to_the_bit(whole: Whole, step: int, tmp_path: Path) -> None:
    folder, made, callback, _ = whole
    stored = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
    begun = stored["stateful_callbacks"]["PreLoraCallback"]["attributes"]["phases"]["begun"]
    assert begun[-1]["name"] == CHECKPOINTS[step]
    resumed, again = run(tmp_path, folder / f"checkpoint-{step}")
    assert losses(resumed) == losses(made)
    assert equal(resumed.model, made.model)
    assert again.report == callback.report


class Convolutions(nn.Module):
    """No model of transformers, with a batch norm, whose statistics a checkpoint must have too."""

    def __init__(self) -> None:
        super().__init__()
        kernels = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
        self.net = nn.Sequential(*kernels, nn.Flatten(), nn.Linear(8 * 16, 3))

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.net(pixel_values)
        return {"logits": logits} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}


def tokens() -> list[dict[str, Any]]:
    found = torch.randint(3, 99, (64, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in found]


OTHERS: dict[str, tuple[Any, Any, dict[str, Any], dict[str, Any]]] = {
    "tied, DoRA, dropout": (
        lambda: llama(hidden_size=16, num_attention_heads=2),
        tokens,
        {"use_dora": True, "lora_dropout": 0.1, "task_type": "CAUSAL_LM", "target_modules": "all-linear"},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "gradient_checkpointing": True},
    ),
    "convolutions": (Convolutions, rows, {"target_modules": ["net.0", "net.3"], "modules_to_save": ["net.6"]}, {}),
}


@pytest.mark.smoke
@pytest.mark.parametrize("name", OTHERS)
def test_other_models_and_options(name: str, tmp_path: Path) -> None:
    build, data, config, options = OTHERS[name]
    whole: Any = None
    for resume in (None, "checkpoint-5", "checkpoint-7", "checkpoint-11"):
        torch.manual_seed(0)
        save = {"save_strategy": "no"} if resume else {"save_strategy": "steps", "save_steps": 1, "logging_steps": 3}
        made = trainer(tmp_path / (resume or "whole"), build(), **{**options, **save})
        made.train_dataset = data()
        callback = prelora(LottaLoraConfig(seed=1, redraw="none", save_kept=True, **config)).attach(made)
        made.train(resume_from_checkpoint=None if resume is None else str(tmp_path / "whole" / resume))
        whole = whole or (made, callback)
        assert equal(made.model, whole[0].model) and callback.report == whole[1].report
    model = callback.peft_model().eval()
    model.save_pretrained(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(build(), tmp_path / "saved").eval()
    inputs = {key: torch.stack([row[key] for row in data()[:2]]) for key in data()[0] if key != "labels"}
    with torch.no_grad():
        assert torch.equal(loaded(**inputs)["logits"], model(**inputs)["logits"])


def test_a_checkpoint_has_the_models_own_names(whole: Whole) -> None:
    """By which alone a ViT is resumed, and which from_pretrained reads as well."""
    folder, _, _, _ = whole
    stored = load_file(folder / "checkpoint-5" / "model.safetensors")
    assert stored.keys() == vit().state_dict().keys()
    loaded = ViTForImageClassification.from_pretrained(folder / "checkpoint-5").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in stored.items())


def test_weights_under_other_names_are_refused(whole: Whole, tmp_path: Path) -> None:
    """As Trainer writes them of a ViT, and goes on with what it has initialised, with a warning."""
    copied = tmp_path / "checkpoint-5"
    shutil.copytree(whole[0] / "checkpoint-5", copied)
    stored = load_file(copied / "model.safetensors")
    hub_names = {name.replace(".0.", ".first."): value for name, value in stored.items()}
    save_file(hub_names, copied / "model.safetensors", {"format": "pt"})
    before = vit()
    made = trainer(tmp_path, before)
    prelora().attach(made)
    with pytest.raises(ValueError, match=r"16 of 40 tensors are missing, 16 are unknown .* Nothing was loaded"):
        made.train(resume_from_checkpoint=str(copied))
    assert equal(before, vit())


def test_checkpoints_of_other_settings_are_refused(whole: Whole, tmp_path: Path) -> None:
    folder = whole[0]
    for settings, message in (
        ({"thresholds": (1, 5)}, r"thresholds=\[1000000.0, 1000000.0\], here \[1, 5\]"),
        ({"joint_steps": 5, "ranks": (2, 4, 8)}, r"ranks=\[2, 4\], here \[2, 4, 8\]; joint_steps=4, here 5"),
        ({"config": LottaLoraConfig(seed=7, redraw="none")}, "config="),
    ):
        model = vit()
        other = trainer(tmp_path, model)
        prelora(**settings).attach(other)
        with pytest.raises(ValueError, match=f"{message}.*Nothing has changed"):
            other.train(resume_from_checkpoint=str(folder / "checkpoint-13"))
        assert equal(model, vit())


def test_checkpoints_made_without_it_are_refused(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    made = trainer(tmp_path)
    prelora().attach(made)
    with pytest.raises(ValueError, match="was made without PreLoraCallback"):
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


# ---- the artifact -------------------------------------------------------------------------------------------------

LOAD = """
import sys, torch
torch.set_num_threads(1)
from hf_lottalora import AutoLottaLoraModelForImageClassification
model = AutoLottaLoraModelForImageClassification.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])
"""


@pytest.mark.smoke
def test_the_artifact_has_the_same_logits_in_another_process(whole: Whole, tmp_path: Path) -> None:
    model = whole[2].peft_model()
    model.save_pretrained(tmp_path / "saved")
    images = torch.stack([row["pixel_values"] for row in rows(8)])
    torch.save(images, tmp_path / "images")
    command = [sys.executable, "-c", LOAD, tmp_path / "saved", tmp_path / "images", tmp_path / "logits"]
    subprocess.run(command, check=True)
    with torch.no_grad():
        mine, trained = model.eval()(images).logits, whole[1].model.eval()(images).logits
    assert torch.equal(torch.load(tmp_path / "logits"), mine) and torch.equal(mine, trained)
    with torch.no_grad(), model.disable_adapter():
        assert not torch.equal(model(images).logits, mine)
    with torch.no_grad():
        assert torch.equal(model(images).logits, mine)


def test_an_artifact_over_the_base_that_was_trained(tmp_path: Path) -> None:
    made = trainer(tmp_path / "run", max_steps=12)
    callback = prelora(LottaLoraConfig(seed=1, redraw="none"), joint_steps=2).attach(made)
    made.train()
    with pytest.raises(ValueError, match="Name a folder to write it to"):
        callback.peft_model()
    model = callback.peft_model(base=tmp_path / "base").eval()
    model.save_pretrained(tmp_path / "saved")
    sizes = [sum(f.stat().st_size for f in (tmp_path / name).glob("*.safetensors")) for name in ("base", "saved")]
    base = ViTForImageClassification.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, tmp_path / "saved").eval()
    images = torch.stack([row["pixel_values"] for row in rows(8)])
    with torch.no_grad():
        assert torch.equal(loaded(images).logits, model(images).logits)
    assert sizes[1] < sizes[0]
    assert json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tmp_path / "base"
    )
    with pytest.raises(ValueError, match="Nothing was loaded|is not the base|differs|another"):
        PeftModel.from_pretrained(vit(), tmp_path / "saved")


def test_what_never_converges_has_no_adapters(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=8)
    callback = prelora(thresholds=(1e-9, 1e-9)).attach(made)
    made.train()
    assert callback.phase == "full" and callback.report.converged_at is None and len(callback.report.windows) == 4
    assert "converged (loss <= 1e-09 %, each family's ||W|| < 1e-09 %): not yet" in str(callback.report)
    with pytest.raises(ValueError, match="training has not converged"):
        callback.peft_model()
    with pytest.raises(ValueError, match="trains a model once"):
        made.train()
    with pytest.raises(ValueError, match="resumes into a new model"):
        made.train(resume_from_checkpoint=str(tmp_path))


def test_the_report(whole: Whole, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    text = str(whole[2].report)
    assert f"after step {JOINT}" in text and re.search(r"lora  from step 10: [\d,]+ of [\d,]+ parameters trained", text)
    assert f"{family_of(TARGETS[0], {})}: " in text
    whole[2].report.plot(tmp_path / "phases.png")
    assert (tmp_path / "phases.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="nothing to plot"):
        prelora().attach(trainer(tmp_path)).report.plot()


# ---- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ranks": (8, 4)}, "ranks must be positive integers in ascending order.*got .8, 4."),
        ({"ranks": (4, 4)}, "ascending order"),
        ({"ranks": ()}, "ascending order"),
        ({"ranks": (0, 4)}, "ascending order"),
        ({"thresholds": (1, 0)}, "thresholds must be two positive numbers"),
        ({"thresholds": (1, 2, 3)}, "thresholds must be two positive numbers"),
        ({"window": 0}, "window must be an integer of at least 1, got 0"),
        ({"windows": 1}, "windows must be an integer of at least 2, got 1"),
        ({"joint_steps": 1.5}, "joint_steps must be an integer"),
        ({"rewarmup_steps": -1}, "rewarmup_steps must be an integer of at least 0"),
        ({"rank_by": "norms"}, "rank_by must be one of"),
        ({"families": {"q": "("}}, r"families\['q'\]: '\(' is no regular expression"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prelora(**settings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"redraw": "targets"}, "redraw='targets' would draw over"),
        ({"redraw": "none", "adapter": "randlora"}, "adapter='randlora' is another"),
        ({"redraw": "none", "rank_pattern": {"q_proj": 3}}, "Leave rank_pattern out"),
        ({"redraw": "none", "embeddings": "lora"}, r"'model.embed_tokens' \(embedding\) does not support"),
    ],
)
def test_configs_that_do_not_go_with_it(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planned(llama(tie_word_embeddings=False), LottaLoraConfig(seed=1, **options), (2, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"},
            "load_best_model_at_end",
        ),
        ({"restore_callback_states_from_checkpoint": True}, "it restores itself"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
    ],
)
def test_trainers_that_do_not_go_with_it(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"PreLoRA does not go with .*{message}"):
        prelora().attach(trainer(tmp_path, **options))


def test_engines_and_models_that_do_not_go_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(tmp_path, get_peft_model(vit(), LottaLoraConfig(seed=1, redraw="none")))
    with pytest.raises(ValueError, match="does not go with a PeftModel"):
        prelora().attach(made)
    made = trainer(tmp_path)
    for kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.XLA):
        monkeypatch.setattr(type(made.accelerator), "distributed_type", property(lambda self, kind=kind: kind))
        with pytest.raises(ValueError, match=f"does not go with {kind.value}: it holds on"):
            prelora().attach(made)


def test_nothing_changes_where_training_is_refused(tmp_path: Path) -> None:
    model = vit()
    made = trainer(tmp_path, model)
    prelora(window=6).attach(made)
    with pytest.raises(ValueError, match="first passes after 18, and training ends after 16"):
        made.train()
    assert equal(model, vit())
    made = trainer(tmp_path, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps")
    prelora().attach(made)
    with pytest.raises(ValueError, match="a ReduceLROnPlateau does not know"):
        made.train()
    made = trainer(tmp_path, callbacks=[prelora()])
    with pytest.raises(ValueError, match=r"call prelora.attach\(trainer\) before train"):
        made.train()
    callback = prelora().attach(trainer(tmp_path))
    with pytest.raises(ValueError, match="attached once"):
        callback.attach(trainer(tmp_path))


# ---- two processes ------------------------------------------------------------------------------------------------


@pytest.mark.smoke  # a launch takes a minute
@pytest.mark.skipif(compare_versions("transformers", "<", "5.24"), reason="5.0 resumes one process on CPUs, not two")
def test_two_processes_decide_alike_and_resume_to_the_bit(tmp_path: Path) -> None:
    torchrun = [Path(sys.executable).parent / "torchrun", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, Path(__file__).parent / "prelora_worker.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-6000:]
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert (
        found[0]["ranks alike"] and found[0]["ranks"] == found[1]["ranks"] and found[0]["report"] == found[1]["report"]
    )
    assert found[0]["logits"] == found[1]["logits"]
    for rank in found:
        assert rank["phases"] == [0, JOINT, LORA]
        assert all(rank[f"resumed from {step}"] == [True, True] for step in CHECKPOINTS)
