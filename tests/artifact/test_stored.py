"""Artifacts with fewer digits, and without rows that are as drawn: what is in them, what comes back, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny import config, ids, llama, logits, perturb
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from hf_lottalora import AutoLottaLoraModelForCausalLM, saving_loss
from hf_lottalora.artifact.reader import ArtifactError
from hf_lottalora.artifact.stored import _shrunk, decoded, file_shapes
from hf_lottalora.plan.canonical import canonical_json, digest_of
from hf_lottalora.plan.storage import ROWS_KEY, SCALES_KEY, Shrinkable

WEIGHTS, MANIFEST = "adapter_model.safetensors", "lottalora_manifest"
TABLE = "base_model.model.model.embed_tokens.weight"
DTYPES = ("float16", "bfloat16", "int8")
TRAINED_ROWS = [0, 5, 6, 98]


def untied(**changes: Any) -> nn.Module:
    return llama(tie_word_embeddings=False, **changes)


def manifest_in(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(bytes(load_file(folder / WEIGHTS)[MANIFEST].numpy()))
    return content


def table_of(model: PeftModel) -> torch.Tensor:
    return model.get_base_model().model.embed_tokens.weight


def trained(dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    """Everything trained, but of the embeddings four rows only."""
    model = get_peft_model(untied().to(dtype), config(task_type="CAUSAL_LM", **options)).eval()
    drawn = table_of(model).detach().clone()
    perturb(model)
    with torch.no_grad():
        rest = [row for row in range(99) if row not in TRAINED_ROWS]
        table_of(model)[rest] = drawn[rest]
    return model


@pytest.fixture(scope="module")
def model() -> PeftModel:
    return trained()


def save(model: PeftModel, folder: Path, save_dtype: str | None) -> Path:
    model.peft_config["default"].save_dtype = save_dtype
    model.save_pretrained(folder)
    model.peft_config["default"].save_dtype = None
    return folder


# ---- codes and scales -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [False, True])
def test_codes_of_what_they_restore_are_the_same(dtype: torch.dtype, columns: bool) -> None:
    """Of any size, subnormal numbers and zeros included; and no value is further off than half a step."""
    generator = torch.Generator().manual_seed(0)
    low, high = (-24, 15) if dtype is torch.float16 else (-140, 127)
    scales = torch.linspace(low, high, 6000, dtype=torch.float64).exp2()[:, None]
    x = torch.randn(6000, 7, generator=generator, dtype=torch.float64).clamp(-1.9, 1.9) * scales
    x = torch.cat([x, torch.zeros(1, 7), torch.rand(1000, 1, generator=generator).expand(1000, 7)]).to(dtype)
    x = x.t().contiguous() if columns else x
    tensor = Shrinkable("", tuple(x.shape), (1, x.shape[1]) if columns else (x.shape[0], 1))
    once = _shrunk("x", x, tensor, "int8")
    restored = once.restored().to(dtype)
    again = _shrunk("x", restored, tensor, "int8")
    assert once.values.dtype is torch.int8 and once.scales is not None and again.scales is not None
    assert torch.equal(once.values, again.values) and torch.equal(once.scales, again.scales)
    assert torch.equal(again.restored().to(dtype), restored)
    off, step = (x.double() - restored.double()).abs(), once.scales.double()
    assert bool((off <= torch.where(step == 0, 2.0**-102, step / 2)).all())


# ---- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save_dtype", DTYPES)
def test_every_way_of_loading_gives_the_same_and_saves_it_again(
    model: PeftModel, save_dtype: str, tmp_path: Path
) -> None:
    folder = save(model, tmp_path / "own", save_dtype)
    resumed = get_peft_model(untied(), config(task_type="CAUSAL_LM", save_dtype=save_dtype, adapter_seed=9))
    resumed.load_adapter(folder, "default")  # as Trainer does, over other starting values
    taken = get_peft_model(untied(), config(task_type="CAUSAL_LM", save_dtype=save_dtype))
    set_peft_model_state_dict(taken, load_peft_weights(str(folder)))
    ways = {
        "auto": AutoLottaLoraModelForCausalLM.from_pretrained(folder),
        "peft": PeftModel.from_pretrained(untied(), folder),
        "peft, low memory": PeftModel.from_pretrained(untied(), folder, low_cpu_mem_usage=True),
        "resumed": resumed,
        "state dict": taken,
    }
    expected = get_peft_model_state_dict(ways["auto"])
    for way, again in ways.items():
        found = get_peft_model_state_dict(again)
        assert all(torch.equal(found[key], expected[key]) for key in expected if key != MANIFEST), way
        if way != "resumed":  # whose options differ
            again.save_pretrained(tmp_path / way)
            assert (tmp_path / way / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes(), way
    exact = get_peft_model_state_dict(model)
    for key in exact.keys() - {MANIFEST}:
        error = (exact[key] - expected[key]).norm() / exact[key].norm()
        assert error < {"float16": 4e-4, "bfloat16": 3e-3, "int8": 1e-2}[save_dtype], key
        assert error > 0 or exact[key].numel() == 1, key
    rest = [row for row in range(99) if row not in TRAINED_ROWS]
    assert torch.equal(table_of(ways["auto"])[rest], table_of(model)[rest])
    assert (logits(ways["auto"]) - logits(model)).abs().max() < 0.1


def test_what_is_in_an_int8_file(model: PeftModel, tmp_path: Path) -> None:
    tensors = load_file(save(model, tmp_path, "int8") / WEIGHTS)
    layer, shapes = "base_model.model.model.layers.1.self_attn.o_proj", model.get_plan().saved_shapes()
    assert tensors.keys() == shapes.keys() | {MANIFEST, SCALES_KEY, ROWS_KEY}
    found = {key: (tensors[key].dtype, tuple(tensors[key].shape)) for key in tensors}
    assert found[f"{layer}.lora_A.weight"] == (torch.int8, (4, 32))
    assert found[f"{layer}.lora_B.weight"] == (torch.int8, (32, 4))
    assert found[f"{layer}.lora_beta"] == (torch.float32, (1,))
    assert found["base_model.model.model.norm.weight"] == (torch.float16, (32,))
    assert found["base_model.model.lm_head.weight"] == (torch.int8, (99, 32))
    assert found[TABLE] == (torch.int8, (4, 32)) and found[ROWS_KEY] == (torch.int32, (4,))
    assert found[SCALES_KEY] == (torch.bfloat16, (8 * (4 + 4) + 99 + 4,))
    assert tensors[ROWS_KEY].tolist() == TRAINED_ROWS
    stored = manifest_in(tmp_path)["stored"]
    assert stored["forms"] == {
        "base_model.model.lm_head.weight": "int8",
        TABLE: "int8",
        "base_model.model.model.layers.*.input_layernorm.weight": "float16",
        "base_model.model.model.layers.*.post_attention_layernorm.weight": "float16",
        "base_model.model.model.norm.weight": "float16",
        **{
            f"base_model.model.model.layers.*.self_attn.{name}_proj.lora_{matrix}.weight": "int8"
            for name in "qkvo"
            for matrix in "AB"
        },
    }
    assert json.loads((tmp_path / "adapter_config.json").read_text())["save_dtype"] == "int8"


def test_the_loss_is_said_everywhere(model: PeftModel, tmp_path: Path) -> None:
    loss = saving_loss(model, "int8")
    assert loss.keys() == {"A and B", "embeddings", "head", "norms"}
    exact = get_peft_model_state_dict(model)
    again = get_peft_model_state_dict(AutoLottaLoraModelForCausalLM.from_pretrained(save(model, tmp_path, "int8")))
    some = [key for key in exact if ".lora_A" in key or ".lora_B" in key]
    off = torch.cat([(exact[key] - again[key]).flatten() for key in some])
    assert loss["A and B"].relative == pytest.approx(
        float(off.norm() / torch.cat([exact[key].flatten() for key in some]).norm()), rel=0.01
    )
    assert loss["A and B"].largest == pytest.approx(float(off.abs().max()), rel=0.01)
    assert manifest_in(tmp_path)["stored"]["loss"] == {group: list(errors) for group, errors in loss.items()}
    said = ", ".join(f"{100 * loss[group].relative:.2g} % of {group}" for group in sorted(loss))
    card = (tmp_path / "README.md").read_text()
    assert f"| saved in | int8, with a relative error of {said} |" in card
    assert (
        "| rows of trained embeddings here | 4 of 99 of `model.embed_tokens.weight`, the others are as drawn |" in card
    )
    with pytest.raises(ValueError, match=r"save_dtype must be one of \['float16', 'bfloat16', 'int8'\], got 'int4'"):
        saving_loss(model, "int4")  # type: ignore[arg-type]


def test_tensors_in_memory_are_whole_and_exact(model: PeftModel) -> None:
    model.peft_config["default"].save_dtype = "int8"
    state = get_peft_model_state_dict(model)
    model.peft_config["default"].save_dtype = None
    assert {
        key: tuple(value.shape) for key, value in state.items() if key != MANIFEST
    } == model.get_plan().saved_shapes()
    assert torch.equal(state[TABLE], table_of(model))
    again = get_peft_model(untied(), config(task_type="CAUSAL_LM")).eval()
    set_peft_model_state_dict(again, state)
    assert torch.equal(logits(again), logits(model))


def test_kept_tensors_and_integers_stay_exact(tmp_path: Path) -> None:
    """And kernels are codes: A with a scale per row, B per column, a trained one per output."""
    net = ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    )
    model = get_peft_model(net, config(target_modules=["layer.1.convolution"], save_dtype="int8"))
    perturb(model)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.add_(3 if "num_batches" in name else 0.12345)
    model.save_pretrained(tmp_path)
    tensors, exact, plan = load_file(tmp_path / WEIGHTS), get_peft_model_state_dict(model), model.get_plan()
    kept = {f"base_model.model.{tensor.path}" for tensor in plan.with_role("kept")}
    assert {exact[key].dtype for key in kept} == {torch.float32, torch.int64}
    assert all(torch.equal(tensors[key], exact[key]) and tensors[key].dtype is exact[key].dtype for key in kept)
    kernels = [key for key in tensors if "lora_" in key and tensors[key].dim() == 4]
    assert kernels and all(tensors[key].dtype is torch.int8 for key in kernels)
    shrinkable = plan.shrinkable()
    a, b = sorted(kernels)[:2]
    assert shrinkable[a].scales == (4, 1, 1, 1) and shrinkable[b].scales == (1, 4, 1, 1)


# ---- rows -------------------------------------------------------------------------------------------------------------


def test_rows_that_no_token_has_trained_are_not_stored(tmp_path: Path) -> None:
    model = get_peft_model(untied(), config())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        model(input_ids=ids(), labels=ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    assert tensors[ROWS_KEY].tolist() == sorted(set(ids()[:, :-1].flatten().tolist()))  # the last predict none
    assert torch.equal(tensors[TABLE], table_of(model)[tensors[ROWS_KEY].long()])
    stored = manifest_in(tmp_path)["stored"]
    assert (stored["dtype"], stored["forms"], stored["loss"]) == (None, {}, {})
    again = AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(table_of(again), table_of(model)) and torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(("saved", "loaded"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_rows_are_drawn_in_the_dtype_that_they_were_saved_in(saved: str, loaded: str, tmp_path: Path) -> None:
    model = trained(getattr(torch, saved))
    model.save_pretrained(tmp_path)
    again = AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path, dtype=loaded)
    assert load_file(tmp_path / WEIGHTS)[TABLE].shape == (4, 32)
    assert torch.equal(table_of(again), table_of(model).to(getattr(torch, loaded)))


@pytest.mark.parametrize("build", [llama, untied])
def test_a_table_of_which_every_row_has_changed(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    """By weight decay, or as a head. Nothing is then said that older versions do not know."""
    model = get_peft_model(build(), config())
    perturb(model)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / WEIGHTS).keys() == model.get_plan().saved_shapes().keys() | {MANIFEST}
    assert "stored" not in manifest_in(tmp_path) and "save_dtype" not in manifest_in(tmp_path)["options"]
    why = "weight decay, a head tied to the table, or use of every row leaves none as drawn"
    line = f"| rows of trained embeddings here | all 99 of `model.embed_tokens.weight`: {why} |"
    assert line in (tmp_path / "README.md").read_text()


# ---- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("save_dtype", "name", "value", "found"),
    [
        ("float16", "lora_A", 1e6, "values up to 1e"),
        ("int8", "layernorm", 1e6, "values up to 1e"),
        ("int8", "lora_B", float("nan"), "values that are not finite"),
        ("bfloat16", "lm_head", float("inf"), "values that are not finite"),
    ],
)
def test_values_that_do_not_fit(save_dtype: str, name: str, value: float, found: str, tmp_path: Path) -> None:
    model = trained(save_dtype=save_dtype)
    parameter = next(p for key, p in model.named_parameters() if name in key)
    with torch.no_grad():
        parameter.view(-1)[3] = value
    with pytest.raises(ValueError, match=rf"{name}.* cannot be saved in .*: it has {found}.*\. Nothing was written\."):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    model.peft_config["default"].save_dtype = None
    model.save_pretrained(tmp_path / "new")


@pytest.mark.parametrize(("save_dtype", "value"), [("bfloat16", 1e20), ("int8", 1e20), ("bfloat16", 3e38)])
def test_the_loss_of_huge_values(save_dtype: Any, value: float, tmp_path: Path) -> None:
    """Whose squares float32 cannot hold."""
    model = trained(save_dtype=save_dtype)
    A = next(p for key, p in model.named_parameters() if "lora_A" in key)
    with torch.no_grad():
        A.div_(A.abs().max()).mul_(value)
    loss = saving_loss(model, save_dtype)["A and B"]
    assert 1e-4 < loss.relative < 0.02 and loss.largest > 1e-4 * value
    model.save_pretrained(tmp_path)


def test_a_dtype_that_is_none(model: PeftModel, tmp_path: Path) -> None:
    message = r"save_dtype must be one of \['float16', 'bfloat16', 'int8'\] or None, got 'float8'"
    with pytest.raises(ValueError, match=message):
        config(save_dtype="float8")
    with pytest.raises(ValueError, match=message):
        save(model, tmp_path / "new", "float8")
    model.peft_config["default"].save_dtype = None
    assert not (tmp_path / "new").exists()


NORM = "base_model.model.model.norm.weight"
SPOILT: dict[str, tuple[tuple[str, ...], Any, str]] = {
    "a field is missing": (("loss",), ..., r"stored: expected \['dtype', 'forms', 'loss', 'tables'\], found"),
    "a field too many": (("x",), 1, "stored: expected"),
    "no such form": (("forms", NORM), "int4", r"stored: forms\['.*norm.weight'\] must be one of"),
    "codes of a vector": (
        ("forms", NORM),
        "int8",
        "expected float16, bfloat16 or none for '.*norm.weight', found int8",
    ),
    "no such tensor": (("forms", "x"), "int8", "stored.forms: expected tensors that this model saves so, found 'x'"),
    "no such table": (("tables", NORM), {}, "stored.tables: expected tensors that this model saves so, found"),
    "a loss of one number": (("loss", "norms"), [0.1], "stored.loss: expected two numbers for 'norms'"),
    "too many rows": (("tables", TABLE, "rows"), 100, "rows: expected one of a table of 99 rows, found 100"),
    "a number as dtype": (("tables", TABLE, "dtype"), 3, "dtype must be a string, got 3"),
    "no floating dtype": (
        ("tables", TABLE, "dtype"),
        "int8",
        "dtype: expected one of a table of 99 rows, found 'int8'",
    ),
    "a seed below zero": (("tables", TABLE, "seed"), -1, r"seed must satisfy 0 <= seed < 2\*\*64"),
    "no such family": (("tables", TABLE, "family"), "no such", "no such"),
    "a family of matrices": (("tables", TABLE, "family"), "orthogonal", "family: expected"),
    "no scale": (("tables", TABLE, "scale"), 0.0, "scale: expected"),
    "a row that is not there": (("tables", TABLE, "zero_row"), 99, "zero_row: expected"),
}


@pytest.fixture(scope="module")
def signed(model: PeftModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = save(model, tmp_path_factory.mktemp("signed"), "int8")
    return folder, manifest_in(folder)


@pytest.mark.parametrize("what", SPOILT)
def test_what_is_said_of_the_forms_is_compared_with_the_plan(
    what: str, model: PeftModel, signed: tuple[Path, dict[str, Any]]
) -> None:
    (*places, key), value, message = SPOILT[what]
    stored = deepcopy(signed[1]["stored"])
    place = stored
    for name in places:
        place = place[name]
    if value is ...:
        del place[key]
    else:
        place[key] = value
    with pytest.raises(ArtifactError, match=message):
        file_shapes(model.get_plan(), stored, "The file")


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (("forms", "base_model.model.lm_head.weight"), "'lottalora_scales' with shape .*, expected .68,"),
        (("tables", TABLE), r"embed_tokens.weight' with shape .4, 32., expected .99, 32."),
    ],
)
def test_a_file_that_is_signed_anew_is_refused_before_anything_is_built(
    places: tuple[str, str], message: str, signed: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    content, tensors = deepcopy(signed[1]), load_file(signed[0] / WEIGHTS)
    del content["stored"][places[0]][places[1]], content["artifact"]
    content["artifact"] = digest_of(content)
    tensors[MANIFEST] = torch.frombuffer(bytearray(canonical_json(content)), dtype=torch.uint8)
    for file in signed[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    base = untied()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


@pytest.mark.parametrize("rows", [[0, 5, 5, 98], [5, 0, 6, 98], [-1, 5, 6, 98], [0, 5, 6, 99]])
def test_numbers_of_rows_that_are_none(rows: list[int], signed: tuple[Path, dict[str, Any]], model: PeftModel) -> None:
    tensors = load_file(signed[0] / WEIGHTS)
    tensors[ROWS_KEY] = torch.tensor(rows, dtype=torch.int32)
    with pytest.raises(ArtifactError, match="lottalora_rows: expected 4 ascending numbers below 99"):
        decoded(model.get_plan(), signed[1]["stored"], tensors, "The file")
