"""Artifacts on the hub: a server on this machine stands for it, see `helpers/hub.py`."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import Hub
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load, save
from tiny import config, llama, logits, perturb

from hf_lottalora import AutoLottaLoraModelForCausalLM, LottaLoraConfig

FILES = {"adapter_config.json", "adapter_model.safetensors", "config.json", "README.md"}
load_alone = AutoLottaLoraModelForCausalLM.from_pretrained


def trained(**options: Any) -> PeftModel:
    model = get_peft_model(llama(), config(task_type="CAUSAL_LM", **options)).eval()
    perturb(model)
    return model


def uploaded(hub: Hub, revision: str = "main", repo_id: str = "user/name") -> set[str]:
    return hub.repos[repo_id].files(revision).keys() - {".gitattributes"}


WAYS = {
    "ours": load_alone,
    "PeftModel": lambda path, **hub: PeftModel.from_pretrained(llama(), path, **hub),
    "AutoPeftModel": AutoPeftModelForCausalLM.from_pretrained,
}


@pytest.mark.parametrize("way", WAYS)
def test_pushed_and_loaded(hub: Hub, way: str) -> None:
    model = trained()
    commit = model.push_to_hub("user/name")
    assert uploaded(hub) == FILES and commit.oid == hub.repos["user/name"].refs["main"]
    assert not hub.repos["user/name"].private
    again = WAYS[way]("user/name")
    assert type(again) is type(model) and torch.equal(logits(again), logits(model))


def test_never_a_scaffold_weight(hub: Hub) -> None:
    model = trained()
    model.push_to_hub("user/name")
    keys = load(hub.repos["user/name"].files()["adapter_model.safetensors"])
    assert keys.keys() == {*model.get_plan().saved_shapes(), "lottalora_manifest"}
    assert not any(path in key for key in keys for path in model.get_plan().scaffold)


def test_several_adapters(hub: Hub) -> None:
    model = trained()
    model.add_adapter("other", config(adapter_seed=1, task_type="CAUSAL_LM"))
    model.set_adapter("other")
    perturb(model)
    model.push_to_hub("user/name")
    assert uploaded(hub) == FILES | {f"other/{name}" for name in FILES}
    again = load_alone("user/name", subfolder="other")
    assert torch.equal(logits(again), logits(model))
    card = hub.repos["user/name"].files()["other/README.md"].decode()
    assert 'from_pretrained("user/name", subfolder="other")' in card
    both = load_alone("user/name")
    both.load_adapter("user/name", "other", subfolder="other")
    both.set_adapter("other")
    assert torch.equal(logits(both), logits(model))


def test_private(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trained().push_to_hub("user/name", private=True)
    assert hub.repos["user/name"].private
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    for name, way in WAYS.items():
        cache = str(tmp_path / name)
        with pytest.raises((OSError, ValueError), match="has no such repository or shows it to some tokens only"):
            way("user/name", cache_dir=cache)
        way("user/name", token="read_user", cache_dir=cache)


def test_branch(hub: Hub) -> None:
    main, other = trained(), trained(adapter_seed=7)
    main.push_to_hub("user/name")
    other.push_to_hub("user/name", revision="other/branch", commit_message="The other one")
    assert uploaded(hub, "other/branch") == FILES
    for way in WAYS.values():
        assert torch.equal(logits(way("user/name")), logits(main))
        assert torch.equal(logits(way("user/name", revision="other/branch")), logits(other))
    card = hub.repos["user/name"].files("other/branch")["README.md"].decode()
    assert 'from_pretrained("user/name", revision="other/branch")' in card
    assert "revision=" not in hub.repos["user/name"].files()["README.md"].decode()


def test_pull_request(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    trained().push_to_hub("user/name")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    model = trained(adapter_seed=7)
    commit = model.push_to_hub("user/name", create_pr=True)
    assert commit.pr_revision == "refs/pr/1" and uploaded(hub, "refs/pr/1") == FILES
    assert torch.equal(logits(load_alone("user/name", revision="refs/pr/1")), logits(model))
    with pytest.raises(HfHubHTTPError, match="403"):
        model.push_to_hub("user/name")


def test_into_ones_own_namespace(hub: Hub) -> None:
    trained().push_to_hub("name")
    assert uploaded(hub) == FILES and '"user/name"' in hub.repos["user/name"].files()["README.md"].decode()


def test_saving_pushes(hub: Hub, tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path / "here", push_to_hub=True, repo_id="user/name", private=True, commit_message="One")
    assert uploaded(hub) == FILES == {file.name for file in (tmp_path / "here").iterdir()}
    assert hub.repos["user/name"].private
    (tmp_path / "by_folder").mkdir()
    (tmp_path / "by_folder" / "secret.txt").write_text("of the user")
    model.save_pretrained(tmp_path / "by_folder", push_to_hub=True)
    assert uploaded(hub, repo_id="user/by_folder") == FILES
    assert torch.equal(logits(load_alone("user/by_folder")), logits(model))
    with pytest.raises(HFValidationError):
        model.save_pretrained(tmp_path / "not", push_to_hub=True, repo_id="no/such/name")
    assert not (tmp_path / "not").exists()
    requests = len(hub.requests)
    model.save_pretrained(tmp_path / "rank 1", push_to_hub=True, repo_id="user/name", is_main_process=False)
    model.save_pretrained(tmp_path / "here", push_to_hub=False)
    assert len(hub.requests) == requests


def test_upload_folder(hub: Hub, tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path)
    HfApi().create_repo("user/name")
    HfApi().upload_folder(repo_id="user/name", folder_path=tmp_path, path_in_repo="runs/1")
    assert uploaded(hub) == {f"runs/1/{name}" for name in FILES}
    for way in WAYS.values():
        assert torch.equal(logits(way("user/name", subfolder="runs/1")), logits(model))


def test_pushed_twice_is_one_file_anew(hub: Hub) -> None:
    model = trained()
    model.push_to_hub("user/name")
    before = dict(hub.repos["user/name"].files())
    model.push_to_hub("user/name")
    assert hub.repos["user/name"].files() == before
    perturb(model)
    model.push_to_hub("user/name")
    after = hub.repos["user/name"].files()
    assert {name for name in FILES if after[name] != before[name]} <= {"adapter_model.safetensors", "README.md"}


@pytest.mark.parametrize("way", [*WAYS, "load_adapter"])
def test_all_files_are_of_one_commit(hub: Hub, way: str) -> None:
    """The branch moves before each file: newer weights fit the older config, and would be loaded with it."""
    models = {None: trained(), 7: trained(adapter_seed=7)}
    for model in models.values():
        model.push_to_hub("user/name")
    repo = hub.repos["user/name"]
    old, new = [files for files in repo.commits.values() if "README.md" in files]
    repo.commit(old)
    model = trained()
    moves = itertools.cycle([old, new])
    hub.rule("HEAD .*/resolve/", lambda: repo.commit(next(moves)))
    if way == "load_adapter":
        model.load_adapter("user/name", "again")
        model.set_adapter("again")
    else:
        model = WAYS[way]("user/name")
    read = model.peft_config[model.active_adapter].adapter_seed
    assert torch.equal(logits(model), logits(models[read]))
    assert len(repo.commits) > 5


def test_one_repository_is_loaded_again_into_an_adapter(hub: Hub) -> None:
    first, second = trained(), trained()
    perturb(second)
    first.push_to_hub("user/name")
    model = PeftModel.from_pretrained(llama(), "user/name")
    second.push_to_hub("user/name")
    model.load_adapter("user/name", "default")  # of today, not of the commit that its config was read from
    assert torch.equal(logits(model), logits(second))
    first.push_to_hub("user/other")
    read = LottaLoraConfig.from_pretrained("user/name")
    read.inference_mode = False
    model = get_peft_model(llama(), read)
    model.load_adapter("user/other", "default")  # the commit that the config has is of another repository
    assert torch.equal(logits(model), logits(first))


def test_a_base_model_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    HfApi().create_repo("user/base")
    HfApi().upload_folder(repo_id="user/base", folder_path=tmp_path / "base")
    base = type(llama()).from_pretrained("user/base")
    model = get_peft_model(base, config(redraw="none", embeddings="frozen", task_type="CAUSAL_LM")).eval()
    perturb(model)
    model.push_to_hub("user/name")
    card = hub.repos["user/name"].files()["README.md"].decode()
    assert "base_model: user/base\n" in card and "base_model:adapter:user/base" in card
    for way in (load_alone, AutoPeftModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match="over the base model 'user/base' .* which was not fetched"):
            way("user/name")
    again = AutoLottaLoraModelForCausalLM.from_pretrained("user/name", base_model=True)
    assert torch.equal(logits(again), logits(model))


def test_an_unwanted_tensor_would_show(hub: Hub) -> None:
    """The other way round: what is in the file is what the loader reads."""
    trained().push_to_hub("user/name")
    files = dict(hub.repos["user/name"].files())
    tensors = load(files["adapter_model.safetensors"])
    tensors["base_model.model.model.layers.0.mlp.up_proj.weight"] = torch.zeros(48, 32)
    hub.repos["user/name"].commit({**files, "adapter_model.safetensors": save(tensors)})
    with pytest.raises(ValueError, match="expected the 30 tensors that were saved, found 31"):
        load_alone("user/name")
    assert constants.HF_HUB_CACHE.startswith(str(hub.home))
