"""Checkpoints that transformers, or transformers and PEFT, load without this package."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import SIZES, bert, config, gpt2, ids, llama, logits, mlp, perturb, vit
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from hf_lottalora import export_dense, export_lora
from hf_lottalora.artifact.checkpoint import Checkpoint
from hf_lottalora.artifact.tensor_file import TensorFile
from hf_lottalora.paths import owner_of


def mixtral() -> MixtralForCausalLM:
    """Its checkpoints have the experts one by one, the model has them fused."""
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4))


def mobilenet() -> nn.Module:
    """Its code asks convolutions for their strides."""
    sizes = {"image_size": 32, "depth_multiplier": 0.25}
    return transformers.MobileNetV2ForImageClassification(transformers.MobileNetV2Config(**sizes))


# The model in each residency, and what merges in a way of its own.
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "tied": (llama, {"residency": "streamed", "embeddings": "lora", "task_type": "CAUSAL_LM"}),
    "untied": (
        lambda: llama(tie_word_embeddings=False),
        {
            "residency": "packed",
            "embeddings": "lora",
            "head": "lora",
            "rank_pattern": {"q_proj": 2},
            "use_rslora": True,
        },
    ),
    "biases": (bert, {"lora_bias": True, "task_type": "SEQ_CLS"}),
    "conv1d": (gpt2, {"residency": "streamed", "target_modules": "all-linear"}),
    "dora": (gpt2, {"use_dora": True}),
    "rows": (llama, {"trainable_token_indices": [3, 4], "embeddings": "frozen", "residency": "streamed"}),
    "residual": (llama, {"residual": True}),
    "conv": (vit, {"target_modules": ["projection"], "residency": "packed"}),
    "experts": (mixtral, {"residency": "streamed"}),
}
PLAIN = ("untied", "biases", "conv1d", "rows")


def made(name: str, **changes: Any) -> PeftModel:
    build, options = MODELS[name]
    model = get_peft_model(build(), config(**{**options, **changes})).eval()
    perturb(model)
    return model


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("name", MODELS)
def test_every_byte_is_that_of_merge_and_unload(name: str, tmp_path: Path) -> None:
    model = made(name)
    size = "20KB" if name == "untied" else "1GB"
    before, kinds = state(model), {key: type(value) for key, value in model.named_parameters()}
    assert export_dense(model, tmp_path / "ours", max_shard_size=size) == tmp_path / "ours"
    after = state(model)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert kinds == {key: type(value) for key, value in model.named_parameters()}  # in its residency
    model.merge_and_unload().save_pretrained(tmp_path / "theirs", max_shard_size=size)
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")
    assert (len(list((tmp_path / "ours").glob("*-of-*"))) > 3) == (name == "untied")


ALONE = """
import json, sys
import torch
from peft import PeftModel
import transformers
expected = json.load(open(sys.argv[1]))
for folder, (auto, inputs, logits) in expected.items():
    lora = folder.endswith("lora")
    load = getattr(transformers, auto).from_pretrained
    model = PeftModel.from_pretrained(load(folder + "/base"), folder + "/adapter") if lora else load(folder)
    found = model.eval()(torch.tensor(inputs))[0]
    assert torch.allclose(found, torch.tensor(logits), atol=2e-5), (folder, (found - torch.tensor(logits)).abs().max())
    if lora:
        assert type(model.peft_config["default"]).__name__ == "LoraConfig" and not model.peft_config["default"].use_dora
assert "hf_lottalora" not in sys.modules
print(len(expected))
"""


@pytest.mark.smoke
def test_loaded_and_computing_the_same_without_this_package(tmp_path: Path) -> None:
    autos = {"biases": "AutoModelForSequenceClassification"}
    expected = {}
    for name in ("tied", "untied", "biases", "conv1d", "rows"):
        model = made(name)
        case = [autos.get(name, "AutoModelForCausalLM"), ids().tolist(), logits(model).tolist()]
        expected[str(export_dense(model, tmp_path / name))] = case
        if name in PLAIN:
            expected[str(export_lora(model, tmp_path / f"{name}-lora"))] = case
    (tmp_path / "expected.json").write_text(json.dumps(expected))
    command = [sys.executable, "-W", "error::UserWarning", "-c", ALONE, str(tmp_path / "expected.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) == 9


@pytest.mark.parametrize("name", ["untied", "biases"])
def test_a_plain_adapter_has_a_and_b_as_they_are(name: str, tmp_path: Path) -> None:
    model = made(name)
    export_lora(model, tmp_path, base_name="user/base")
    found = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    mine = model.peft_config["default"]
    assert found["peft_type"] == "LORA" and found["base_model_name_or_path"] == "user/base"
    assert [found[key] for key in ("r", "lora_alpha", "rank_pattern", "use_rslora")] == [
        mine.r, mine.lora_alpha, mine.rank_pattern, mine.use_rslora
    ]  # fmt: skip
    live = {key.replace(".default", ""): value for key, value in model.state_dict().items()}
    saved = tensors(tmp_path / "adapter")
    kept = [key for key in live if ".lora_A" in key or ".lora_B" in key or ".lora_embedding" in key]
    assert saved.keys() == set(kept) and all(torch.equal(saved[key], live[key]) for key in kept)
    export_dense(model, tmp_path / "dense")
    assert tensors(tmp_path / "base").keys() == tensors(tmp_path / "dense").keys()


CANNOT: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], Any, str]] = {
    "layer_norm": (llama, {"layer_norm": True}, export_dense, r"'model\.layers\.0\..*have a LayerNorm after the layer"),
    "dora": (llama, {"use_dora": True}, export_lora, r"'model\.layers\.0.*it has use_dora"),
    "residual": (llama, {"residual": True}, export_lora, "it has residual"),
    "norm": (llama, {"layer_norm": True}, export_lora, "it has layer_norm"),
    "tied": (llama, {"embeddings": "lora"}, export_lora, "'lm_head' .* shares the adapter of the embedding"),
    "sizes": (
        mobilenet,
        {"target_modules": ["expand_1x1.convolution"]},
        export_lora,
        "'mobilenet_v2.*the model reads this convolution's stride",
    ),
}


@pytest.mark.parametrize("name", CANNOT)
def test_what_cannot_be_is_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    build, options, export, message = CANNOT[name]
    model = get_peft_model(build(), config(**options))
    with pytest.raises(ValueError, match=rf"(?s){message}.*Nothing was written"):
        export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_merged_or_unknown_adapters(tmp_path: Path) -> None:
    model = made("untied", residency="dense")
    with pytest.raises(ValueError, match="There is no adapter 'other'.*Nothing was written"):
        export_dense(model, tmp_path / "out", adapter_names=["other"])
    for size in (None, 0, -1, True, "abc", "0GB"):
        with pytest.raises(ValueError, match="max_shard_size must be a number of bytes above 0"):
            export_dense(model, tmp_path / "out", max_shard_size=size)
    export_dense(model, tmp_path / "before")
    export_dense(model, tmp_path / "twice", adapter_names=["default", "default"])
    assert files(tmp_path / "before") == files(tmp_path / "twice")
    model.merge_adapter()
    export_dense(model, tmp_path / "merged")
    assert files(tmp_path / "before") == files(tmp_path / "merged")
    with pytest.raises(ValueError, match="adapters are merged into it .*Nothing was written"):
        export_lora(model, tmp_path / "out")
    model.unmerge_adapter()
    with model.base_model.scaffold_off(), pytest.raises(ValueError, match="Leave scaffold_seed and scaffold_off"):
        export_dense(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_is_not_active(tmp_path: Path) -> None:
    """With its own trained tensors, which are in place only while they are written."""
    model = made("untied")
    model.add_adapter("other", config(**{**MODELS["untied"][1], "adapter_seed": 7}))
    model.set_adapter("other")
    perturb(model)
    want = logits(model)
    model.set_adapter("default")
    before = logits(model)
    export_dense(model, tmp_path / "out", adapter_names=["other"])
    assert torch.equal(logits(model), before)
    again = type(llama()).from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(again), want, atol=2e-5, rtol=0)


def test_rounded_once_to_another_dtype(tmp_path: Path) -> None:
    model = made("untied")
    export_dense(model, tmp_path / "half", dtype="bfloat16")
    export_dense(model, tmp_path / "full")
    half, full = tensors(tmp_path / "half"), tensors(tmp_path / "full")
    assert {value.dtype for value in half.values()} == {torch.bfloat16}
    assert all(torch.equal(half[key], full[key].to(torch.bfloat16)) for key in full)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_one_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a value is asked for, those before are gone; also where several are made of one, as of experts."""
    write, values = Checkpoint.write, list[Any]()

    def watched(self: Checkpoint, folder: Path, value_of: Any, *rest: Any) -> None:
        def asked(name: str) -> torch.Tensor:
            assert all(value() is None for value in values)
            value = value_of(name).clone()
            values.append(weakref.ref(value))
            return value

        write(self, folder, asked, *rest)

    monkeypatch.setattr(Checkpoint, "write", watched)
    export_dense(made("experts"), tmp_path)
    assert len(values) < len(tensors(tmp_path))


def test_a_file_is_that_of_safetensors(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {
        "b": torch.randn(7, 3, generator=generator),
        "a": torch.randn(5, generator=generator).to(torch.bfloat16),
        "scalar": torch.tensor(3),
        "none": torch.empty(0, 4),
        "flags": torch.tensor([True, False, True]),
        "turned": torch.randn(4, 6, generator=generator).t(),
    }
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "theirs", {"format": "pt"})
    file = TensorFile(tmp_path / "ours", {key: value.to("meta") for key, value in state.items()})
    for key in reversed(state):
        file.write(key, state[key])
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_folders_with_files(saved: tuple[PeftModel, Path], tmp_path: Path) -> None:
    model, artifact = saved
    for folder in (artifact, artifact / "config.json"):
        with pytest.raises(FileExistsError, match="Nothing was written"):
            export_dense(model, folder, overwrite=folder == artifact)
    out = tmp_path / "out"
    export_dense(model, out, max_shard_size="20KB")
    of_the_user = {"notes.txt", "model_ema.safetensors", "model-notes.safetensors.txt", "model.safetensors.bak"}
    for name in of_the_user:
        (out / name).write_text("of the user")
    before = files(out)
    with pytest.raises(FileExistsError, match=r"out is not empty.*overwrite=True \(--force\)"):
        export_dense(model, out)
    assert files(out) == before
    export_dense(model, out, overwrite=True)
    assert files(out).keys() == {"config.json", "generation_config.json", "model.safetensors"} | of_the_user
    export_lora(model, tmp_path / "lora")
    export_lora(model, tmp_path / "lora", overwrite=True)
    assert {name.partition("/")[0] for name in files(tmp_path / "lora")} == {"base", "adapter"}


def test_an_artifact_with_what_lies_beside_it(saved: tuple[PeftModel, Path], tmp_path: Path) -> None:
    model, artifact = saved
    beside = {"tokenizer.json": "{}", "tokenizer_config.json": "{}", "chat_template.jinja": "", "secret.txt": ""}
    for name, text in beside.items():
        (artifact / name).write_text(text)
    (artifact / "generation_config.json").write_text('{"max_new_tokens": 7}')
    export_dense(model, tmp_path / "model")
    export_dense(artifact, tmp_path / "path")
    export_lora(artifact, tmp_path / "lora")
    ours, its = files(tmp_path / "model"), files(tmp_path / "path")
    added = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert its.keys() == ours.keys() | added == files(tmp_path / "lora" / "base").keys()
    assert its["model.safetensors"] == ours["model.safetensors"]
    assert json.loads(its["generation_config.json"]) == {"max_new_tokens": 7}
    with pytest.raises(TypeError, match=r"\['subfolder'\] is for loading an artifact"):
        export_dense(model, tmp_path / "other", subfolder="x")


def test_what_a_configuration_would_not_build(tmp_path: Path) -> None:
    model = made("tied")
    model.get_base_model().config.vocab_size = 98
    with pytest.raises(ValueError, match=r"builds 'model\.embed_tokens\.weight' of shape \(98, 32\), .* \(99, 32\)"):
        export_dense(model, tmp_path / "out")
    model = made("untied")
    model.get_base_model().config.tie_word_embeddings = True
    with pytest.raises(ValueError, match=r"ties 'lm_head\.weight' to 'model\.embed_tokens\.weight', which are two"):
        export_dense(model, tmp_path / "out")
    plain = get_peft_model(mlp(), config(target_modules=["0"], modules_to_save=["4"]))
    with pytest.raises(TypeError, match="A Sequential is no model of transformers"):
        export_dense(plain, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_of_a_pretrained_model_stay(tmp_path: Path) -> None:
    mixtral().save_pretrained(tmp_path / "base")
    base = MixtralForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, config(redraw="none", embeddings="frozen", norms="frozen"))
    perturb(model)
    export_dense(model, tmp_path / "out")
    assert tensors(tmp_path / "out").keys() == tensors(tmp_path / "base").keys()
    assert any(".experts.3.w1.weight" in key for key in tensors(tmp_path / "out"))


@pytest.mark.smoke
def test_names_that_transformers_converts(tmp_path: Path) -> None:
    """The files of small models of all architectures whose checkpoints have other names than the model."""
    recorded = json.loads(architectures.RESULTS.read_text())["models"]
    wrong, tried = [], 0
    for model_type, entry in recorded.items():
        if not entry["runs"] or not get_checkpoint_conversion_mapping(model_type):
            continue
        try:
            model = architectures.built(getattr(transformers, entry["class"]), model_type)
        except Exception:  # another transformers, which does not have it
            continue
        live = {name: getattr(*owner_of(model, name)).detach() for name in model.state_dict()}
        ids = {name: id(getattr(*owner_of(model, name))) for name in live}
        empty = {ids[name]: torch.empty_like(live[name], device="meta") for name in live}
        ours, theirs = tmp_path / model_type / "ours", tmp_path / model_type / "theirs"
        ours.mkdir(parents=True)
        checkpoint = Checkpoint(model, {name: empty[ids[name]] for name in live})
        checkpoint.write(ours, live.__getitem__, "1GB", lambda count: None)
        model.save_pretrained(theirs)
        name, tried = "model.safetensors", tried + 1
        wrong += [model_type] if (ours / name).read_bytes() != (theirs / name).read_bytes() else []
        shutil.rmtree(tmp_path / model_type)
    assert not wrong and tried > (10 if transformers.__version__.startswith("5.0.") else 20)
