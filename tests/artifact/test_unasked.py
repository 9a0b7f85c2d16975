"""An artifact runs nothing and fetches nothing unasked, and a model that it cannot have is not built."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from test_artifact_refused import WEIGHTS, edit_manifest
from test_reader import ARCHITECTURE, CONFIG, WAYS, edit
from tiny import config, llama, logits, perturb
from torch import nn
from transformers import LlamaForCausalLM

from hf_lottalora import AutoLottaLoraModelForCausalLM, LottaLoraConfig
from hf_lottalora.artifact.base import base_of
from hf_lottalora.artifact.hollow import hollow
from hf_lottalora.artifact.reader import ArtifactError

load = AutoLottaLoraModelForCausalLM.from_pretrained
COMMIT = "0123456789abcdef0123456789abcdef01234567"


# ---- what is built ----------------------------------------------------------------------------------------------------


def as_of_0_1(folder: Path) -> Path:
    """The artifact with the manifest of version 0.1, which says nothing of config.json and options."""
    content = json.loads(bytes(load_file(folder / WEIGHTS)["lottalora_manifest"].numpy()))
    later = ("trained", "class", "architecture", "options", "tensors", "artifact")
    edit_manifest(folder, **dict.fromkeys(later, ...))
    assert content.keys() >= set(later)
    edit(folder, CONFIG, lottalora_version="0.1.0")
    return folder


@pytest.mark.filterwarnings("ignore:.*was written by version 0.1")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 900}, "config.json: .* the model has far more tensors than the artifact"),
        ({"num_hidden_layers": -1}, "config.json: |in the artifact|lacks"),
        ({"num_attention_heads": 0}, "config.json: expected what transformers .* can build, found"),
        ({"hidden_size": "32"}, "config.json: expected what transformers .* can build, found"),
        ({"hidden_size": 2**26}, "config.json: expected what transformers .* can build, found|shape"),
        ({"hidden_act": "no such"}, "config.json: expected what transformers .* can build, found KeyError"),
        ({"rope_parameters": {"rope_type": "no such"}}, "config.json: expected what transformers"),
        ({"attention_dropout": 1e30}, "attention_dropout: expected a probability from 0 to 1, found 1e[+]30"),
        ({"dtype": "no such"}, "config.json: expected what transformers"),
        ({"architectures": "LlamaForCausalLM"}, "architectures: expected a list of one class name"),
        ({"architectures": [None]}, "architectures: expected a list of one class name"),
        ({"model_type": "no such"}, "model_type: expected one that transformers .* knows, found 'no such'"),
        ({"model_type": ["llama"]}, r"model_type: expected one that transformers .* knows, found \['llama'\]"),
    ],
)
def test_a_configuration_that_makes_no_model(
    saved: tuple[PeftModel, Path], changes: dict[str, Any], message: str
) -> None:
    edit(as_of_0_1(saved[1]), ARCHITECTURE, **changes)
    start = time.monotonic()
    with pytest.raises(ValueError, match=message):
        load(saved[1])
    assert time.monotonic() - start < 30


def test_a_model_is_not_built_past_a_limit() -> None:
    with hollow(2):
        nn.Linear(2, 2)
    with hollow(2), pytest.raises(ValueError, match="far more tensors than the artifact"):
        nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with hollow():
        assert nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))[1].weight.is_meta


def test_a_device_that_is_not_there_is_said_first() -> None:
    with pytest.raises((RuntimeError, AssertionError), match=r"(?i)cuda|nvidia|hip|device"):
        load("no such artifact", device=f"cuda:{torch.cuda.device_count() + 3}")


@pytest.mark.filterwarnings("ignore:.*was written by version 0.1")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"residual": True}, "was trained with residual=True"),
        ({"scaling": {}}, "scaled by None"),
        ({"rows": {"model.embed_tokens": [1]}}, "has trained rows"),
    ],
)
def test_the_manifest_is_compared_before_anything_is_injected(
    saved: tuple[PeftModel, Path], changes: dict[str, Any], message: str
) -> None:
    edit_manifest(as_of_0_1(saved[1]), **changes)
    base = llama()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, saved[1])
    assert not any(isinstance(module, BaseTunerLayer) for module in base.modules())
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    model = get_peft_model(base, config())
    with pytest.raises(ValueError, match=message):
        model.load_adapter(saved[1], "other")
    assert list(model.peft_config) == ["default"]


# ---- what is run ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*was written by version 0.1")
@pytest.mark.parametrize("model_type", ["llama", "of its own"])
def test_no_code_of_an_artifact_is_run_and_nobody_is_asked(
    saved: tuple[PeftModel, Path], model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = saved
    autos = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
    edit(folder, ARCHITECTURE, model_type=model_type, auto_map=dict.fromkeys(autos, "evil.Evil"))
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Evil: ...\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("someone was asked"))
    for way in ("our loader", "AutoPeftModel"):
        with pytest.raises(ValueError, match="auto_map.AutoConfig: expected 'nothing'|architectures|model_type"):
            WAYS[way](folder)
    as_of_0_1(folder)
    for way in ("our loader", "AutoPeftModel"):
        if model_type == "llama":
            assert torch.equal(logits(WAYS[way](folder)), logits(model))
        else:
            with pytest.raises(ArtifactError, match="found 'of its own'. No code from a repository is run"):
                WAYS[way](folder)
    assert not (folder / "ran").exists()


def test_an_attention_may_be_passed_and_not_be_written(saved: tuple[PeftModel, Path]) -> None:
    torch.testing.assert_close(logits(load(saved[1], attn_implementation="eager")), logits(saved[0]))
    edit(saved[1], ARCHITECTURE, _attn_implementation="eager")
    with pytest.raises(ArtifactError, match="_attn_implementation: expected none, since transformers does not write"):
        load(saved[1])


# ---- the base model ---------------------------------------------------------------------------------------------------


def over_a_base(tmp_path: Path, **options: Any) -> tuple[PeftModel, Path]:
    llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, config(redraw="none", task_type="CAUSAL_LM", **options)).eval()
    perturb(model)
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


def test_of_base_models_safetensors_are_read_only(tmp_path: Path) -> None:
    model, folder = over_a_base(tmp_path)
    assert torch.equal(logits(load(folder)), logits(model))
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    torch.save(base.state_dict(), tmp_path / "base" / "pytorch_model.bin")
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match="The base model .* could not be read: .* safetensors are read only; load another"
    ):
        load(folder)


def test_another_base_model_by_name(tmp_path: Path) -> None:
    model, folder = over_a_base(tmp_path)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="The base model '.*base' of .* could not be read"):
        load(folder)
    assert torch.equal(logits(load(folder, base_model=tmp_path / "moved")), logits(model))
    with pytest.raises(ValueError, match=r"was not fetched: .* pass base_model=True"):
        load(folder, base_model=False)


def test_a_base_model_for_an_artifact_without_one(saved: tuple[PeftModel, Path]) -> None:
    with pytest.raises(ValueError, match="needs no base model, got base_model='somewhere'"):
        load(saved[1], base_model="somewhere")
    assert torch.equal(logits(load(saved[1], base_model=True)), logits(saved[0]))


@pytest.mark.parametrize(
    ("named", "revision", "base_model", "found"),
    [
        ("someone/model", None, None, None),
        ("someone/model", "main", None, None),
        ("someone/model", "main", True, ("someone/model", "main")),
        ("someone/model", COMMIT, None, ("someone/model", COMMIT)),
        ("someone/model", COMMIT, False, None),
        ("someone/model", COMMIT, "someone/model", ("someone/model", COMMIT)),
        ("someone/model", COMMIT, "other/model", ("other/model", None)),
        (".", None, None, (".", None)),
    ],
)
def test_a_downloaded_artifact_fetches_a_base_model_by_consent_or_commit(
    named: str, revision: str | None, base_model: Any, found: Any
) -> None:
    options = LottaLoraConfig(seed=1, redraw="none", base_model_name_or_path=named, revision=revision)
    if found is None:
        with pytest.raises(ValueError, match=rf"'{named}' \(revision .* was not fetched: .* base_model=True"):
            base_of(options, "user/artifact", base_model)
    else:
        assert base_of(options, "user/artifact", base_model) == found
    if base_model is None:
        assert base_of(options, Path(__file__).parent, None) == (named, revision)  # a folder, as ever


def test_a_downloaded_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = over_a_base(tmp_path)
    edit(folder, CONFIG, base_model_name_or_path="someone/model")
    repository = tmp_path / "cache" / "models--user--artifact"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "snapshots").mkdir()
    folder.rename(repository / "snapshots" / COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    hub = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    for loader in (AutoLottaLoraModelForCausalLM, AutoPeftModelForCausalLM):
        with pytest.raises(ValueError, match=r"base model 'someone/model' \(revision None\), which was not fetched"):
            loader.from_pretrained("user/artifact", **hub)
    with pytest.raises(ValueError, match="The base model 'someone/model' of user/artifact could not be read"):
        load("user/artifact", base_model=True, **hub)
    assert torch.equal(logits(load("user/artifact", base_model=tmp_path / "base", **hub)), logits(model))


def test_a_folder_without_a_config_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "user" / "artifact" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in ("hf_lottalora.artifact.hub.hf_hub_download", "peft.config.hf_hub_download"):
        monkeypatch.setattr(name, lambda *args, **kwargs: pytest.fail("asked the hub"))
    for more in ({}, {"subfolder": "sub"}, {"subfolder": "no such"}):
        with pytest.raises(ArtifactError, match="Can't find 'adapter_config.json' at 'user/artifact"):
            load("user/artifact", **more)


def test_the_writer_writes_what_the_reader_takes(saved: tuple[PeftModel, Path]) -> None:
    """A file that was read and written again is the same."""
    content = json.loads((saved[1] / CONFIG).read_text())
    model = load(saved[1])
    model.save_pretrained(saved[1] / "again")
    assert json.loads((saved[1] / "again" / CONFIG).read_text()) == content
