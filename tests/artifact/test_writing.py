"""Saving leaves the old artifact or the new one, whole; `kills.py` does what is killed, or goes on at once."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import peft.peft_model
import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from tiny import config, llama, logits, perturb
from transformers import Trainer, TrainingArguments

from hf_lottalora import AutoLottaLoraModelForCausalLM, LottaLoraConfig
from hf_lottalora.artifact import current, files, writing

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FILES = {WEIGHTS, CONFIG, "config.json", "README.md"}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def another() -> PeftModel:
    model = get_peft_model(llama(num_hidden_layers=1), config(seed=7, r=2)).eval()
    perturb(model)
    return model


def killed(test: Callable[..., None]) -> Callable[..., None]:
    """Forks processes and kills them, by `kills.py`."""
    return pytest.mark.smoke(pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")(test))


@pytest.fixture(scope="module")
def counts() -> dict[str, Any]:
    command = [
        sys.executable,
        str(Path(__file__).with_name("kills.py")),
        "--points",
        "--random",
        "3",
        "--together",
        "2",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return {"errors": done.stderr, **json.loads(done.stdout)}


@killed
def test_a_kill_before_any_call_leaves_old_or_new(counts: dict[str, Any]) -> None:
    for case, found in counts["points"].items():
        assert found["lost"] == 0 and found["old"] >= 15 and found["new"] >= 3, (case, found, counts["errors"])


@killed
def test_a_kill_at_a_random_moment_leaves_old_or_new(counts: dict[str, Any]) -> None:
    assert not any(found["lost"] for found in counts["random"].values()), counts


@killed
def test_two_processes_that_save_and_one_that_loads(counts: dict[str, Any]) -> None:
    found = counts["together"]
    assert found["lost"] == 0 and found["old"] + found["new"] >= 2, counts


def full(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def full_halfway(tensors: Any, file: str, **kwargs: Any) -> None:
    Path(file).write_bytes(b"half of it")
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("where", ["weights", "fsync", "config"])
def test_a_full_disk(saved: tuple[PeftModel, Path], where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, model = saved[1], another()
    before = contents(folder)
    with monkeypatch.context() as patch:
        if where == "weights":
            patch.setattr(peft.peft_model, "safe_save_file", full_halfway)
        elif where == "fsync":
            patch.setattr(os, "fsync", full)
        else:
            patch.setattr(LottaLoraConfig, "save_pretrained", full)
        needed = f"{model.get_plan().artifact_bytes():,} bytes"
        with pytest.raises(OSError, match=rf"needs about {needed}.* is unchanged.* save elsewhere") as raised:
            model.save_pretrained(folder)
        assert raised.value.errno == errno.ENOSPC
        with pytest.raises(OSError, match="needs about"):
            model.save_pretrained(folder.parent / "new" / "one")
    assert contents(folder) == before
    assert names(folder) == FILES and names(folder.parent) == {folder.name}
    model.save_pretrained(folder)
    assert torch.equal(logits(AutoLottaLoraModelForCausalLM.from_pretrained(folder)), logits(model))


@pytest.mark.parametrize("call", range(1, 7))
def test_an_error_while_files_are_put_in_place(
    saved: tuple[PeftModel, Path], call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rename, weights, then three more files and none."""
    (old, folder), new = saved, another()
    calls: list[Any] = []

    def fails(original: Any) -> Any:
        def move(self: Path, other: Path) -> Path:
            calls.append(other)
            if len(calls) == call:
                raise PermissionError("not today")
            return original(self, other)

        return move

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fails(Path.rename))
        patch.setattr(Path, "replace", fails(Path.replace))
        if call < 6:
            with pytest.raises(PermissionError, match="not today"):
                new.save_pretrained(folder)
        else:
            new.save_pretrained(folder)
    assert (names(folder) == FILES) == (call not in (3, 4, 5))
    found = AutoLottaLoraModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(found), logits(new if call > 2 else old))
    assert LottaLoraConfig.from_pretrained(folder).r == (2 if call > 2 else 4)
    new.save_pretrained(folder)
    assert names(folder) == FILES


def test_what_waits_is_read_in_a_folder_that_cannot_be_written_and_goes_with_other_weights(
    saved: tuple[PeftModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, new = saved[1], another()
    before = contents(folder)
    with monkeypatch.context() as patch, pytest.raises(PermissionError):
        patch.setattr(writing, "_move", lambda *a, **k: (_ for _ in ()).throw(PermissionError()))
        new.save_pretrained(folder)
    assert len(names(folder) - FILES) == 1
    copy = shutil.copytree(folder, folder.parent / "copy")
    folder.chmod(0o555)
    after = contents(folder)
    base = llama(num_hidden_layers=1)
    for again in (AutoLottaLoraModelForCausalLM.from_pretrained(folder), PeftModel.from_pretrained(base, copy)):
        assert torch.equal(logits(again), logits(new))
    folder.chmod(0o755)
    assert contents(folder) == after
    for name in FILES:  # by hand
        (folder / name).write_bytes(before[name])
    assert torch.equal(logits(AutoLottaLoraModelForCausalLM.from_pretrained(folder)), logits(saved[0]))


def test_what_killed_saves_left_is_removed_when_it_is_old(saved: tuple[PeftModel, Path]) -> None:
    model, folder = saved
    for name, age in (("old", 2), ("young", 0)):
        left = folder / f"{current.PREFIX}{name}"
        left.mkdir()
        (left / WEIGHTS).write_bytes(b"half of it")
        then = time.time() - age * writing.ABANDONED_AFTER
        for path in (left / WEIGHTS, left):
            os.utime(path, (then, then))
    model.save_pretrained(folder)
    assert names(folder) == FILES | {f"{current.PREFIX}young"}


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    model = get_peft_model(llama(), config())
    before = os.umask(0o027)
    try:
        model.save_pretrained(tmp_path)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o640}


def test_a_pickled_save_leaves_nothing(saved: tuple[PeftModel, Path], tmp_path: Path) -> None:
    model, folder = saved
    before = contents(folder)
    for where in (tmp_path / "new" / "one", folder):
        with pytest.raises(ValueError, match=r"safe_serialization=False would write a pickle.* Nothing was written"):
            model.save_pretrained(where, safe_serialization=False)
    assert contents(folder) == before and names(tmp_path) == {folder.name}
    torch.save({}, folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"contains adapter_model.bin, a pickle; .* Nothing was written"):
        another().save_pretrained(folder)
    assert {name: contents(folder)[name] for name in before} == before


def test_several_adapters_in_their_folders(saved: tuple[PeftModel, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = saved
    model.add_adapter("other", config(r=2))
    model.save_pretrained(folder)
    (folder / "other" / "README.md").write_text("Words on the other.")
    (folder / "tokenizer.json").write_text("{}")
    model.save_pretrained(folder)
    assert names(folder) == FILES | {"other", "tokenizer.json"} and names(folder / "other") == FILES
    assert "Words on the other." in (folder / "other" / "README.md").read_text()
    assert AutoLottaLoraModelForCausalLM.from_pretrained(folder, subfolder="other").peft_config["default"].r == 2
    alone = folder.parent / "alone"
    model.save_pretrained(alone, selected_adapters=["other"])
    assert names(alone) == {"other"} and names(alone / "other") == FILES


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    model = get_peft_model(llama(), config())
    model.save_pretrained(tmp_path, True, None, "auto", False)
    assert not names(tmp_path)


@pytest.mark.parametrize("error", [PermissionError, NotImplementedError])
def test_where_nothing_can_be_locked(tmp_path: Path, error: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    get_peft_model(llama(), config()).save_pretrained(tmp_path)
    assert names(tmp_path) == FILES


def test_threads_that_save_into_one_folder(tmp_path: Path) -> None:
    models = [another(), get_peft_model(llama(), config()).eval()]
    threads = [threading.Thread(target=lambda m=m: [m.save_pretrained(tmp_path) for _ in range(2)]) for m in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names(tmp_path) == FILES
    found = logits(AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path))
    assert any(torch.equal(found, logits(model)) for model in models)


def test_what_changes_while_it_is_read_is_read_again(
    saved: tuple[PeftModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, new = saved[1], another()
    load, saves = LottaLoraConfig.from_json_file, []

    def overtaken(file: str, **kwargs: Any) -> Any:
        content = load(file, **kwargs)
        if len(saves) < limit:
            saves.append(new.save_pretrained(folder))
        return content

    monkeypatch.setattr(LottaLoraConfig, "from_json_file", overtaken)
    limit = 2
    assert torch.equal(logits(AutoLottaLoraModelForCausalLM.from_pretrained(folder)), logits(new))
    limit = 1000
    with pytest.raises(OSError, match="was saved to while it was loaded, 5 times in a row"):
        LottaLoraConfig.from_pretrained(folder)


def test_weights_that_are_exchanged_between_two_looks_at_them(
    saved: tuple[PeftModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another backbone: then a tensor of the header that was read is not in the file that is opened."""
    folder, new = saved[1], get_peft_model(llama(num_hidden_layers=1), config(seed=43, r=2))
    opened, saves = files.safe_open, []

    def overtaken(*args: Any, **kwargs: Any) -> Any:
        if not saves:
            saves.append(new.save_pretrained(folder))
        return opened(*args, **kwargs)

    monkeypatch.setattr(files, "safe_open", overtaken)
    assert torch.equal(logits(AutoLottaLoraModelForCausalLM.from_pretrained(folder)), logits(new))


def test_a_trainers_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(llama(), config(task_type="CAUSAL_LM"))
    data = Dataset.from_list([{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}] * 4)
    options = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "per_device_train_batch_size": 1}
    args = TrainingArguments(str(tmp_path), max_steps=2, save_steps=1, **options)
    Trainer(model, args, train_dataset=data).train()
    for step in (1, 2):
        found = names(tmp_path / f"checkpoint-{step}")
        assert found > FILES | {"trainer_state.json", "optimizer.pt"}
        assert not any(name.startswith(current.PREFIX) for name in found)
    checkpoint = tmp_path / "checkpoint-2"
    before = contents(checkpoint)
    monkeypatch.setattr(peft.peft_model, "safe_save_file", full_halfway)
    with pytest.raises(OSError, match="needs about"):
        Trainer(model, args, train_dataset=data).save_model(str(checkpoint))
    assert contents(checkpoint) == before
