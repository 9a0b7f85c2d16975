"""Files of an artifact from whoever wrote them: read strictly on every way in, or refused with nothing changed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import config, llama, logits, perturb

from hf_lottalora import AutoLottaLoraModelForCausalLM, LottaLoraConfig
from hf_lottalora.artifact.files import locate
from hf_lottalora.artifact.reader import MAX_DEPTH, ArtifactError, parse

CONFIG, ARCHITECTURE, WEIGHTS = "adapter_config.json", "config.json", "adapter_model.safetensors"


@cache
def other_base() -> Any:
    """What nothing broken is loaded over: it stays as it is."""
    return llama()


@cache
def other_model() -> Any:
    return get_peft_model(llama(), config())


WAYS: dict[str, Callable[[Path], Any]] = {
    "config": LottaLoraConfig.from_pretrained,
    "our loader": AutoLottaLoraModelForCausalLM.from_pretrained,
    "PeftModel": lambda folder: PeftModel.from_pretrained(other_base(), folder),
    "AutoPeftModel": AutoPeftModelForCausalLM.from_pretrained,
    "load_adapter": lambda folder: other_model().load_adapter(folder, "other"),
}


def load_every_way(folder: Path) -> None:
    for load in WAYS.values():
        load(folder)
    other_base.cache_clear()
    other_model.cache_clear()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[PeftModel, Path]:
    model = get_peft_model(llama(), config(task_type="CAUSAL_LM")).eval()
    perturb(model)
    model.save_pretrained(folder := tmp_path_factory.mktemp("original"))
    return model, folder


@pytest.fixture
def saved(original: tuple[PeftModel, Path], tmp_path: Path) -> tuple[PeftModel, Path]:
    """A model that stays as it is, and a copy of its artifact to break."""
    return original[0], Path(shutil.copytree(original[1], tmp_path / "artifact"))


def edit(folder: Path, name: str, /, **changes: Any) -> None:
    """Other values in a JSON file; ... takes a key out."""
    content = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def text(old: str, new: str, name: str = CONFIG) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        before = (folder / name).read_text()
        assert old in before
        (folder / name).write_text(before.replace(old, new, 1))

    return change


def written(data: bytes, name: str = CONFIG) -> Callable[[Path], Any]:
    """Other content, from which PEFT can still tell whose it is: by the weights beside it."""
    return lambda folder: (folder / name).write_bytes(data)


def edited(name: str = CONFIG, **changes: Any) -> Callable[[Path], Any]:
    return lambda folder: edit(folder, name, **changes)


BROKEN = {
    "cut off": (lambda f: (f / CONFIG).write_bytes((f / CONFIG).read_bytes()[:200]), "adapter_config.json: .* found what is damaged"),
    "empty": (written(b""), "found what is damaged"),
    "no UTF-8": (written(b'{"r": "\xff"}'), r"found what is not UTF-8 \(byte 7\)"),
    "a list": (written(b"[1]"), "found a list instead of an object"),
    "nested": (written(b'{"a":' * 10**5), f"found more than {MAX_DEPTH} levels of nesting"),
    "a huge number": (text('"r": 4', '"r": 1' + "0" * 5000), "found what is damaged .Exceeds the limit"),
    "a key twice": (text('"r": 4', '"r": 4, "r": 5'), "found the key 'r' twice"),
    "NaN": (text('"lora_alpha": 8', '"lora_alpha": NaN'), "found the number NaN"),
    "infinity": (text('"lora_alpha": 8', '"lora_alpha": -Infinity'), "found the number -Infinity"),
    "misspelt": (edited(embeddings=..., embedings="frozen"), "adapter_config.json: embedings: .* Did you mean 'embeddings'"),
    "of a newer version": (edited(quantum=3), "quantum: expected a field of LottaLoraConfig, found 3. If a newer version"),
    "a type": (edited(r="4"), r"adapter_config.json: r must be a positive integer, got '4' \(str\)"),
    "a type within": (edited(rank_pattern={"q_proj": [1]}), r"adapter_config.json: rank_pattern\['q_proj'\] must be"),
    "digests of a type": (edited(scaffold_digests=[1]), "scaffold_digests must be a dict from strings to strings"),
    "a task": (edited(task_type="CAUSAL"), "task_type must be one of"),
    "no seed": (edited(seed=...), "adapter_config.json: .* has no 'seed'"),
    "no method": (edited(peft_type=...), "peft_type: expected 'LOTTALORA', found None"),
    "an unknown method": (edited(peft_type="LOTALORA"), "peft_type: expected 'LOTTALORA', found 'LOTALORA'"),
    "no string as method": (edited(peft_type=["LOTTALORA"]), r"expected 'LOTTALORA', found \['LOTTALORA'\]"),
    "plain LoRA": (edited(peft_type="LORA"), "peft_type: expected 'LOTTALORA', found 'LORA'. Another method"),
    "a plain LoRA's config": (lambda f: plain(f), "peft_type: expected 'LOTTALORA', found 'LORA'"),
    "config.json cut off": (written(b'{"model_', ARCHITECTURE), "config.json: .* found what is damaged"),
    "config.json a list": (written(b"[]", ARCHITECTURE), "config.json: .* found a list"),
    "config.json NaN": (text('"rms_norm_eps": 1e-06', '"rms_norm_eps": NaN', ARCHITECTURE), "config.json: .* the number NaN"),
    "config.json is a folder": (lambda f: ((f / ARCHITECTURE).unlink(), (f / ARCHITECTURE).mkdir()), "config.json: expected an ordinary file, found a folder"),
    "config.json is a pipe": (lambda f: ((f / ARCHITECTURE).unlink(), os.mkfifo(f / ARCHITECTURE)), "found a named pipe"),
    "config.json leads out": (lambda f: out(f, ARCHITECTURE), r"config.json: expected a file within .* a symbolic link to .*elsewhere"),
    "config.json leads nowhere": (lambda f: ((f / ARCHITECTURE).unlink(), (f / ARCHITECTURE).symlink_to("no such")), "found none that can be read"),
    "layers": (edited(ARCHITECTURE, num_hidden_layers=10**7), r"num_hidden_layers: expected at most 1000 in an artifact of \d+ tensors, found 10000000"),
    "layers of a part": (edited(ARCHITECTURE, text_config={"parts": [{"n_layer": 10**7}]}), r"text_config.parts\[0\].n_layer: expected at most"),
    "vocabulary": (edited(ARCHITECTURE, vocab_size=10**9), "vocab_size: expected at most 67108864"),
    "positions": (edited(ARCHITECTURE, max_position_embeddings=10**10), "max_position_embeddings: expected at most"),
    "labels": (edited(ARCHITECTURE, num_labels=10**8), "num_labels: expected at most 1000000"),
    "a kernel": (edited(ARCHITECTURE, attn_implementation="kernels-community/flash-attn2"), "attn_implementation: expected none, since transformers"),
    "a kernel inside": (edited(ARCHITECTURE, _attn_implementation={"": "someone/kernel"}), "_attn_implementation.: expected none, since transformers"),
    "flash attention": (edited(ARCHITECTURE, attn_implementation="flash_attention_2"), "'flash_attention_2', which rounds otherwise or may be code"),
    "an architecture on the hub": (edited(ARCHITECTURE, architecture="hf-hub:someone/model"), "found 'hf-hub:someone/model'"),
    "a backbone": (edited(ARCHITECTURE, backbone="someone/model", use_timm_backbone=False), "would be fetched from the hub"),
    "the header": (lambda f: header(f, b"[1]"), "header: .* found a list"),
    "a header without end": (lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 64), "not a readable safetensors file"),
    "a key twice in the header": (lambda f: header(f, b'{"a": 1, "a": 2}'), "header: .* found the key 'a' twice"),
    "a dtype": (lambda f: swap(f, b'"F32"', b'"F99"'), "header: .*: expected a dtype of torch, found 'F99'"),
    "weights are a pipe": (lambda f: ((f / WEIGHTS).unlink(), os.mkfifo(f / WEIGHTS)), "adapter_model.safetensors: .* found a named pipe"),
    "weights lead out": (lambda f: out(f, WEIGHTS), "adapter_model.safetensors: expected a file within"),
    "the manifest a list": (lambda f: manifest(f, b"[1]"), "damaged 'lottalora_manifest': .* found a list"),
    "a key twice in the manifest": (lambda f: manifest(f, b'{"seed": 1, "seed": 2}'), "damaged 'lottalora_manifest': .* 'seed' twice"),
    "digests in the manifest": (lambda f: manifest(f, b'{"scaffold": {"a": 1}}'), r"damaged 'lottalora_manifest': scaffold\['a'\] must be a string"),
}  # fmt: skip


def plain(folder: Path) -> None:
    """The config of an honest plain adapter beside our weights."""
    other = folder.parent / "plain"
    get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(other)
    shutil.copy(other / CONFIG, folder / CONFIG)


def out(folder: Path, name: str) -> None:
    (folder / name).rename(folder.parent / "elsewhere")
    (folder / name).symlink_to(folder.parent / "elsewhere")


def header(folder: Path, content: bytes) -> None:
    (folder / WEIGHTS).write_bytes(len(content).to_bytes(8, "little") + content)


def swap(folder: Path, old: bytes, new: bytes) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes().replace(old, new, 1))


def manifest(folder: Path, content: bytes) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["lottalora_manifest"] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_one_kind_of_error_and_nothing_has_changed_by_then(
    saved: tuple[PeftModel, Path], case: str
) -> None:
    breaking, message = BROKEN[case]
    breaking(saved[1])
    models = [other_base(), other_model()]
    before = [({k: v.clone() for k, v in model.state_dict().items()}, list(model.modules())) for model in models]
    for way, load in WAYS.items():
        with pytest.raises(ArtifactError, match=message):
            load(saved[1])
            pytest.fail(f"{way} loads it")
    for (values, modules), now in zip(before, models, strict=True):
        assert modules == list(now.modules())
        assert all(torch.equal(values[key], value) for key, value in now.state_dict().items())


@pytest.mark.parametrize(
    "case", [case for case in BROKEN if "header" in case or "manifest" in case or "weights" in case]
)
def test_weights_are_checked_on_trainers_way_too(saved: tuple[PeftModel, Path], case: str) -> None:
    """Into an adapter that is there PEFT loads the weights and reads no config."""
    model, folder = saved
    breaking, message = BROKEN[case]
    breaking(folder)
    before = logits(model)
    with pytest.raises(ArtifactError, match=message):
        model.load_adapter(folder, "default")
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("kind", ["folder", "pipe", "link", "nothing", "large"])
def test_a_config_that_is_no_file(saved: tuple[PeftModel, Path], kind: str) -> None:
    file = saved[1] / CONFIG
    file.rename(saved[1].parent / "elsewhere")
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "link":
        file.symlink_to(saved[1].parent / "elsewhere")
    elif kind == "large":
        file.touch()
        os.truncate(file, 2**36)
    said = {
        "folder": "found a folder",
        "pipe": "found a named pipe",
        "link": "a symbolic link",
        "nothing": "Can't find",
        "large": "expected at most 64 MiB, found more",
    }
    for way in WAYS:
        with pytest.raises(ArtifactError, match=said[kind]):
            WAYS[way](saved[1])


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_that_may_not_be_read(saved: tuple[PeftModel, Path]) -> None:
    (saved[1] / CONFIG).chmod(0)
    for way in WAYS:
        with pytest.raises(ArtifactError, match="expected a file that can be read, found Permission denied"):
            WAYS[way](saved[1])


def test_a_file_that_is_too_large(saved: tuple[PeftModel, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_lottalora.artifact.reader.MAX_BYTES", 2**20)
    with (saved[1] / ARCHITECTURE).open("ab") as file:
        file.truncate(2**21)
    for way in WAYS:
        with pytest.raises(ArtifactError, match="config.json: expected at most 1 MiB, found more"):
            WAYS[way](saved[1])


def test_brackets_in_strings_are_no_nesting() -> None:
    long = json.dumps({"a": ["[" * 100, '"{' * 100, "\\"]})
    assert parse(long.encode(), "here") == json.loads(long)


def test_what_a_newer_peft_has_switched_off_is_passed_over(saved: tuple[PeftModel, Path]) -> None:
    model, folder = saved
    edit(folder, CONFIG, newer=None, newest=False, pattern={}, names=[], name="")
    load_every_way(folder)
    assert torch.equal(logits(AutoLottaLoraModelForCausalLM.from_pretrained(folder)), logits(model))
    assert PeftConfig.from_pretrained(folder).seed == 42


def test_a_config_alone_is_read_strictly_too(saved: tuple[PeftModel, Path]) -> None:
    (saved[1] / WEIGHTS).unlink()
    assert PeftConfig.from_pretrained(saved[1]).seed == 42
    edit(saved[1], CONFIG, seed_patern={"q_proj": 1})
    with pytest.raises(ArtifactError, match="Did you mean 'seed_pattern'"):
        PeftConfig.from_pretrained(saved[1])


@pytest.mark.parametrize("shared", [False, True])
def test_links_within_the_hubs_cache(saved: tuple[PeftModel, Path], tmp_path: Path, shared: bool) -> None:
    """snapshots/<revision>/file -> ../../blobs/<hash>, and in newer versions from there to the cache's own blobs."""
    model, folder = saved
    snapshot, blobs = tmp_path / "models--me--it" / "snapshots" / ("0" * 40), tmp_path / "models--me--it" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (tmp_path / "blobs" / "ab").mkdir(parents=True)
    for number, file in enumerate(folder.iterdir()):
        target = blobs / str(number)
        if shared:
            file.rename(tmp_path / "blobs" / "ab" / str(number))
            target.symlink_to(Path("..", "..", "blobs", "ab", str(number)))
        else:
            file.rename(target)
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    load_every_way(snapshot)
    assert torch.equal(logits(AutoLottaLoraModelForCausalLM.from_pretrained(snapshot)), logits(model))
    (tmp_path / "blobs" / "ab").rename(tmp_path / "other")
    (snapshot / "stranger").symlink_to(tmp_path / "other")
    with pytest.raises(ArtifactError):
        locate(snapshot, "stranger")


def test_other_methods_are_read_by_peft_alone(tmp_path: Path) -> None:
    base = llama()
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    edit(tmp_path, CONFIG, newer=3)
    with pytest.warns(UserWarning, match="Unexpected keyword arguments"):
        assert type(PeftModel.from_pretrained(llama(), tmp_path)) is PeftModel
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(json.JSONDecodeError):
        PeftConfig.from_pretrained(tmp_path)


def test_our_weights_under_a_plain_config_that_peft_has_read(saved: tuple[PeftModel, Path]) -> None:
    """As from the hub, where the weights come after the config."""
    plain = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="has the weights of a LottaLoRA artifact, .* says peft_type='LORA'"):
        plain.load_adapter(saved[1], "default")


def test_peft_is_watched_once() -> None:
    from hf_lottalora._registry import register

    before = PeftModel.load_adapter, PeftConfig.from_json_file.__func__
    register()
    assert before == (PeftModel.load_adapter, PeftConfig.from_json_file.__func__)
    assert PeftModel.load_adapter.__name__ == "load_adapter" and PeftModel.load_adapter.__doc__
