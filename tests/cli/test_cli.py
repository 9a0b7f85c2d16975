"""The command `lottalora`: what it prints, to where, and with which code it exits."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ROOT
from hub import Hub
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import config, llama, llama_config, logits, mlp, perturb
from transformers import AutoModelForCausalLM
from typer import Exit
from typer.main import get_command
from typer.testing import CliRunner

from hf_lottalora import AutoLottaLoraModelForCausalLM
from hf_lottalora.scaffold.tensor import ScaffoldTensor
from hf_lottalora_cli import app
from hf_lottalora_cli.reporting import MEANINGS, ExitCode, finish, reporting

HELP = """
import sys
from hf_lottalora_cli import app
for arguments in (["--help"], ["export", "--help"], ["no-such"]):
    try:
        app(arguments, prog_name="lottalora")
    except SystemExit as done:
        print("exit", done.code)
assert not {"torch", "hf_lottalora", "transformers", "rich"} & sys.modules.keys(), sys.modules.keys()
"""


def run(*arguments: Any, code: int = 0) -> tuple[str, str]:
    """Standard output and standard error of a command that exits with this code."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="lottalora")
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, (done.stdout, done.stderr)
    return done.stdout, done.stderr


def data(*arguments: Any, code: int = 0) -> dict[str, Any]:
    """The one JSON document on standard output."""
    found: dict[str, Any] = json.loads(run(*arguments, "--json", code=code)[0])
    return found


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of a trained Llama with a tied head."""
    model = get_peft_model(llama(), config(task_type="CAUSAL_LM")).eval()
    perturb(model)
    folder = tmp_path_factory.mktemp("cli") / "artifact"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def other(artifact: Path) -> Path:
    """Another seed, another rank, another vector of the final norm."""
    model = get_peft_model(llama(), config(seed=7, r=2, task_type="CAUSAL_LM")).eval()
    model.save_pretrained(artifact.parent / "other")
    return artifact.parent / "other"


def test_help_imports_nothing_of_the_package() -> None:
    command = [sys.executable, "-c", HELP]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.findall("exit (.*)", done.stdout) == ["0", "0", "2"]
    assert "lottalora export path/to/artifact" in done.stdout and "No such command 'no-such'" in done.stderr


@pytest.mark.smoke
def test_as_a_module(artifact: Path) -> None:
    command = [sys.executable, "-m", "hf_lottalora", "inspect", str(artifact), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)["seed"] == 42


def test_the_entry_point_is_there() -> None:
    module, _, name = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["lottalora"].partition(
        ":"
    )
    assert callable(getattr(importlib.import_module(module), name))


def test_the_page_lists_all_commands_and_exit_codes() -> None:
    page = (ROOT / "docs" / "cli.md").read_text()
    commands: Any = get_command(app)
    assert re.findall(r"^\| `lottalora (\w+) ", page, flags=re.MULTILINE) == list(commands.commands)
    codes = re.findall(r"^\| (\d+) \| (.*) \|$", page, flags=re.MULTILINE)
    assert codes == [(str(code.value), meaning) for code, meaning in MEANINGS.items()]
    assert list(MEANINGS) == list(ExitCode)


# ---- inspect, plan ---------------------------------------------------------------------------------------------------


def test_inspect(artifact: Path) -> None:
    found = data("inspect", artifact)
    weights = load_file(artifact / "adapter_model.safetensors")
    manifest = json.loads(bytes(weights.pop("lottalora_manifest").numpy()))
    assert found["seed"] == 42 and found["family"] == "normal" and found["ranks"] == {"4": 8}
    assert found["class"] == "LlamaForCausalLM" and found["model_type"] == "llama" and found["commit"] is None
    assert found["digest"] == manifest["artifact"] and found["options"].items() >= manifest["options"].items()
    assert {t["name"]: (t["shape"], t["dtype"], t["bytes"]) for t in found["tensors"]} == {
        key: (list(value.shape), "F32", value.nbytes) for key, value in weights.items()
    }
    assert found["files"] == {file.name: file.stat().st_size for file in artifact.iterdir()}
    text, _ = run("inspect", artifact)
    assert manifest["artifact"] in text and "self_attn.q_proj.lora_A.weight" in text and "layers.0" not in text


def test_inspect_says_what_was_lost(tmp_path: Path) -> None:
    model = get_peft_model(llama(hidden_size=64), config(save_dtype="int8", task_type="CAUSAL_LM"))
    perturb(model)
    model.save_pretrained(tmp_path)
    found = data("inspect", tmp_path)
    assert found["saved_in"] == "int8" and 0 < found["loss"]["A and B"]["relative"] < 0.02
    assert found["parameters"] == model.get_plan().trainable_parameters
    assert re.search(r"saved in +int8, with a relative error of [\d.]+ % of A and B", run("inspect", tmp_path)[0])


def test_plan_of_an_artifact_and_of_an_architecture(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = AutoLottaLoraModelForCausalLM.from_pretrained(artifact).get_plan()
    monkeypatch.setattr(ScaffoldTensor, "draw", None)  # nothing is drawn
    found = data("plan", artifact, "--tokens", 10)
    assert found.items() >= {key: value for key, value in plan.to_dict().items() if key != "rule"}.items()
    assert found["memory_bytes"]["streamed"] == found["memory_bytes"]["dense"] - 4 * found["scaffold_parameters"]
    assert found["memory_bytes"]["int4"] is None and found["costs"]["full_flops"] == 6 * 10 * 17568
    options = (
        "--r",
        2,
        "--family",
        "binary",
        "--target-modules",
        "q_proj,v_proj",
        "--option",
        "scale=0.5",
        "--seed",
        3,
    )
    made = data("plan", artifact / "config.json", *options, "--dtype", "bfloat16")
    assert made["seed"] == 3 and len(made["targets"]) == 4 and {a["r"] for a in made["adapters"]} == {2}
    drawn = [t["base"] for t in made["tensors"] if t["role"] == "scaffold"]
    assert {(base["family"], base["scale"]) for base in drawn} == {("binary", 0.5)}
    rest = made["memory_bytes"]["streamed"]
    assert made["memory_bytes"]["dense"] - rest == 16 * (made["memory_bytes"]["packed"] - rest)
    assert "packed scaffold" in run("plan", artifact.parent / "artifact" / "config.json")[0]


def test_plan_of_wrong_options(artifact: Path, tmp_path: Path) -> None:
    assert "is an artifact, which has its own r" in run("plan", artifact, "--r", 3, code=2)[1]
    for wrong, message in (
        (("--family", "no"), "family"),
        (("--option", "rr=1"), "expected NAME=VALUE with a field of LottaLoraConfig"),
        (("--r", "many"), "--r"),
        (("--dtype", "bogus"), "--dtype"),
        (("--tokens", "9" * 400), "--tokens"),
    ):
        assert message in run("plan", artifact / "config.json", *wrong, code=2)[1]
    nameless = llama_config()
    nameless.save_pretrained(tmp_path)
    assert "pass one, such as --model-class AutoModelForCausalLM" in run("plan", tmp_path, code=3)[1]
    assert data("plan", tmp_path, "--model-class", "AutoModelForCausalLM")["class_name"] == "LlamaForCausalLM"


# ---- verify, diff ----------------------------------------------------------------------------------------------------


def test_verify(artifact: Path, tmp_path: Path) -> None:
    digest = data("inspect", artifact)["digest"]
    found = data("verify", artifact, "--expect", digest)
    assert found["passed"] and found["scaffold"] == {"tensors": 14, "weights": 17408} and found["failed"] is None
    assert data("verify", artifact, "--residency", "packed")["passed"]
    assert data("verify", artifact, "--expect", "0" * 64, code=1)["failed"] == "digest"
    for file in artifact.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = bytearray((tmp_path / "adapter_model.safetensors").read_bytes())
    weights[8 + int.from_bytes(weights[:8], "little")] ^= 1  # the first byte behind the header
    (tmp_path / "adapter_model.safetensors").write_bytes(weights)
    found = data("verify", tmp_path, code=1)
    assert not found["passed"] and found["failed"] == "files" and "is not the tensor that was saved" in found["reason"]
    (tmp_path / "adapter_model.safetensors").write_bytes(weights[:-1])
    assert "may be truncated" in data("verify", tmp_path, code=3)["error"]["message"]


def test_verify_sees_another_draw(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_lottalora.plan.plan import Plan

    digests = Plan.scaffold_digests
    monkeypatch.setattr(Plan, "scaffold_digests", lambda self: {**digests(self), "layers.0.mlp.up_proj.weight": "0"})
    found = data("verify", artifact, code=1)
    assert found["failed"] == "scaffold" and "layers.0.mlp.up_proj.weight" in found["reason"]


def test_diff(artifact: Path, other: Path) -> None:
    assert data("diff", artifact, artifact)["same"] and "are the same" in run("diff", artifact, artifact)[0]
    found = data("diff", artifact, other, code=1)
    assert (
        found["facts"]["seed"] == [42, 7]
        and found["options"] == {"r": [4, 2], "seed": [42, 7]}
        and not found["architecture"]
    )
    assert len(found["scaffold"]) == 14 and not found["base_model"]
    mine, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (artifact, other))
    norm = next(entry for entry in found["tensors"]["differ"] if entry["name"].endswith("model.norm.weight"))
    change = theirs[norm["name"]].double() - mine[norm["name"]].double()
    assert norm["largest"] == change.abs().max().item()
    assert norm["relative"] == pytest.approx((change.norm() / mine[norm["name"]].double().norm()).item())
    text, _ = run("diff", artifact, other, code=1)
    assert "options: r: 4 -> 2" in text and "q_proj.lora_A.weight: [4, 32] -> [2, 32]" in text


# ---- export, push, pull ----------------------------------------------------------------------------------------------


def test_export(artifact: Path, tmp_path: Path) -> None:
    model = AutoLottaLoraModelForCausalLM.from_pretrained(artifact)
    found = data("export", artifact, tmp_path / "dense", "--max-shard-size", "50KB", "--dtype", "float32")
    assert found["files"] == {file.name: file.stat().st_size for file in (tmp_path / "dense").iterdir()}
    assert len([name for name in found["files"] if "-of-" in name]) == 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(again), logits(model), atol=2e-5, rtol=0)
    assert "is not empty" in run("export", artifact, tmp_path / "dense", code=3)[1]
    run("export", artifact, tmp_path / "dense", "--force")
    assert set(data("export", artifact, tmp_path / "lora", "--format", "lora")["files"]) == {
        "base/config.json", "base/generation_config.json", "base/model.safetensors",
        "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
    }  # fmt: skip
    assert "--base-name is for --format lora" in run("export", artifact, tmp_path / "no", "--base-name", "x", code=2)[1]
    assert not (tmp_path / "no").exists()


def test_push_and_pull(hub: Hub, artifact: Path, tmp_path: Path) -> None:
    pushed = data("push", artifact, "user/name", "--commit-message", "One", "--tag", "test")
    own = {file.name for file in artifact.iterdir()}
    assert hub.repos["user/name"].files().keys() - {".gitattributes"} == own
    assert pushed["commit"] == hub.repos["user/name"].refs["main"] and pushed["pr"] is None
    assert "- test\n" in hub.repos["user/name"].files()["README.md"].decode()
    found = data("inspect", "user/name")
    assert found["commit"] == pushed["commit"] and found["digest"] == data("inspect", artifact)["digest"]
    assert data("verify", "user/name")["passed"] and data("diff", "user/name", artifact)["same"]
    assert data("plan", "user/name")["seed"] == 42
    pulled = data("pull", "user/name", tmp_path / "pulled", "--expect", found["digest"])
    assert pulled["commit"] == pushed["commit"] and set(pulled["files"]) == own
    for name in own - {"README.md"}:
        assert (tmp_path / "pulled" / name).read_bytes() == (artifact / name).read_bytes()
    assert "is not empty" in run("pull", "user/name", tmp_path / "pulled", code=3)[1]
    run("pull", "user/name", tmp_path / "pulled", "--force")
    assert data("pull", "user/name", tmp_path / "no", "--expect", "0" * 64, code=1)["digest"] == found["digest"]
    assert data("export", "user/name", tmp_path / "dense")["bytes"] > 0
    hub.repos["user/name"].private = True
    message = "has no such repository or shows it to some tokens only"
    assert message in run("pull", "user/other", tmp_path / "no", code=3)[1]
    assert "403" in run("push", artifact, "other/name", code=3)[1]
    assert not (tmp_path / "no").exists()


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def test_errors_have_a_text_and_no_traceback(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, errors = run("inspect", tmp_path, code=3)
    assert not output and "Traceback" not in errors
    assert errors.startswith("lottalora: error: Can't find 'adapter_config.json'") and str(tmp_path) in errors
    assert data("inspect", tmp_path, code=3)["error"]["type"] == "ArtifactError"
    assert "is a file, expected an artifact's folder" in run("verify", artifact / "config.json", code=3)[1]
    plain = get_peft_model(llama(), LoraConfig(r=1, target_modules=["q_proj"]))
    plain.save_pretrained(tmp_path / "plain")
    for command in ("inspect", "verify"):
        assert "a plain LoRA adapter does not fit" in run(command, tmp_path / "plain", code=3)[1]
    module = get_peft_model(mlp(), config(target_modules=["0"], modules_to_save=["4"]))
    module.save_pretrained(tmp_path / "module")
    assert "of a plain nn.Module" in run("verify", tmp_path / "module", code=3)[1]
    assert data("inspect", tmp_path / "module")["model_type"] is None
    monkeypatch.setenv("HF_DEBUG", "1")
    with pytest.raises(ValueError, match="Can't find"):
        run("inspect", tmp_path)


OWN = """
from hf_lottalora import register_family

register_family("{name}", table=[-1, -1, -1, 3])
"""


def test_a_family_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_lottalora import FAMILIES, register_family

    name = "of_a_module_for_the_command"
    register_family(name, table=[-1, -1, -1, 3])
    get_peft_model(llama(), config(family=name)).save_pretrained(tmp_path / "own")
    monkeypatch.delitem(FAMILIES, name)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_families.py").write_text(OWN.format(name=name))
    for command in ("inspect", "verify"):
        errors = run(command, "own", code=3)[1]
        assert f"of family {name!r}, which is not registered here" in errors and "--import MODULE" in errors
    assert "own_nothing" in run("--import", "own_nothing", "verify", "own", code=2)[1]
    assert data("--import", "own_families", "verify", "own")["passed"]


def test_no_code_of_the_folder_it_is_called_in_is_run(artifact: Path) -> None:
    before = [*sys.path]
    run("inspect", artifact)
    assert sys.path == before


def test_what_cannot_be_printed(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_lottalora.cli.outcome import Outcome

    for stream in ("stdout", "stderr"):
        with Path("/dev/full").open("w") as full, monkeypatch.context() as patch:
            patch.setattr(sys, stream, full)
            with pytest.raises(Exit) as done, reporting(as_json=True):
                if stream == "stdout":
                    finish(Outcome({}, ""), as_json=True)
                raise ValueError("wrong")
            assert done.value.exit_code == ExitCode.REFUSED


def test_a_file_that_cannot_be_read_says_nothing_of_the_artifact(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Path.open

    def open_(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == "config.json":
            raise PermissionError(13, "Permission denied")
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", open_)
    assert "Permission denied" in run("verify", artifact, code=3)[1]


def test_interrupted(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_lottalora.cli import inspect

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(inspect, "inspect", interrupt)
    assert run("inspect", artifact, code=130) == ("", "lottalora: interrupted\n")


def test_a_base_model_is_fetched_when_it_is_wanted(hub: Hub, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, config(redraw="none", embeddings="frozen", task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "artifact")
    assert data("verify", tmp_path / "artifact")["scaffold"] == {"tensors": 0, "weights": 0}
    run("push", tmp_path / "artifact", "user/name")
    (tmp_path / "base").rename(tmp_path / "moved")
    assert "could not be read" in run("verify", tmp_path / "artifact", code=3)[1]
    assert "which was not fetched" in run("verify", "user/name", code=3)[1]
    assert data("verify", "user/name", "--base-model", tmp_path / "moved")["passed"]
    assert "not both" in run("verify", "user/name", "--base-model", "x", "--named-base", code=2)[1]
