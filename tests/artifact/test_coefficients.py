"""Artifacts of RandLoRA and NOLA: what is in them, how small they are, and that they come back to the bit."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import SOURCES, config, llama, logits, perturb
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_lottalora import AutoLottaLoraModelForCausalLM, export_dense, export_lora, make_plan

WEIGHTS = "adapter_model.safetensors"
REDRAWS = ("all", "targets", "none")


def trained(source: str, **changes: Any) -> PeftModel:
    model = get_peft_model(llama(), config(**{"task_type": "CAUSAL_LM", **SOURCES[source], **changes})).eval()
    perturb(model)
    return model


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("save_dtype", [None, "float16", "int8"])
def test_exactly_these_tensors(source: str, save_dtype: Any, tmp_path: Path) -> None:
    model = trained(source, norms="frozen", embeddings="frozen", save_dtype=save_dtype)
    model.save_pretrained(tmp_path)
    found = {key: (tuple(value.shape), value.dtype) for key, value in load_file(tmp_path / WEIGHTS).items()}
    small = torch.float32 if save_dtype is None else torch.float16
    kept = {key: entry for key, entry in found.items() if key.endswith("norm.weight")}
    expected: dict[str, Any] = {"lottalora_manifest": found["lottalora_manifest"], **kept}
    expected["lottalora_stacked.lora_beta"] = ((8, 1), torch.float32)
    if source == "randlora":
        if save_dtype == "int8":
            expected["lottalora_scales"] = found["lottalora_scales"]
            small = torch.int8
        for i in range(2):
            for p in "qkvo":
                path = f"base_model.model.model.layers.{i}.self_attn.{p}_proj"
                expected |= {f"{path}.lora_A.gamma": ((8, 32), small), f"{path}.lora_B.lambda": ((8, 4), small)}
    else:
        small = torch.float32  # seven numbers of a layer are not made smaller
        expected |= {f"lottalora_stacked.lora_{factor}.coefficients": ((8, 7), small) for factor in "AB"}
    assert found == expected
    size = (tmp_path / WEIGHTS).stat().st_size
    assert abs(make_plan(llama(), config(**model.peft_config["default"].to_dict())).artifact_bytes() / size - 1) < 0.05


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("redraw", REDRAWS)
def test_over_any_backbone_it_comes_back_to_the_bit(source: str, redraw: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = llama()
    base.save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning) if redraw != "none" else nullcontext():
        model = get_peft_model(base, config(task_type="CAUSAL_LM", redraw=redraw, **SOURCES[source])).eval()
    perturb(model)
    model.save_pretrained(tmp_path / "artifact")
    again = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "artifact")
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "again")
    first, second = ((tmp_path / name / WEIGHTS).read_bytes() for name in ("artifact", "again"))
    assert first == second
    plain = model.merge_and_unload()
    torch.testing.assert_close(logits(plain), logits(again), rtol=1e-3, atol=1e-4)


@pytest.mark.smoke
@pytest.mark.parametrize("source", SOURCES)
def test_a_new_process_with_another_number_of_threads(source: str, tmp_path: Path) -> None:
    model = trained(source, family="binary", basis_family="binary")
    model.save_pretrained(tmp_path)
    code = (
        "import sys, torch; torch.set_num_threads(2); sys.path.insert(0, sys.argv[2]); from tiny import logits;"
        "from hf_lottalora import AutoLottaLoraModelForCausalLM as A; m = A.from_pretrained(sys.argv[1]);"
        "torch.set_num_threads(1); torch.save(logits(m), sys.argv[1] + '/logits.pt')"
    )
    helpers = Path(__file__).parents[1] / "helpers"
    subprocess.run([sys.executable, "-c", code, str(tmp_path), str(helpers)], check=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(model))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("residency", ["dense", "packed", "streamed"])
def test_loading_into_another_residency(source: str, residency: Any, tmp_path: Path) -> None:
    model = trained(source)
    model.save_pretrained(tmp_path)
    again = AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path, residency=residency)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-5)
    again = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(again), logits(model))


def test_a_file_of_one_kind_is_no_other(tmp_path: Path) -> None:
    for source in ("randlora", "nola by shape"):
        trained(source).save_pretrained(tmp_path / source)
    get_peft_model(llama(), config(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "lora")
    for source, other in (("randlora", "nola"), ("nola by shape", "lora"), ("lora", "randlora")):
        file = tmp_path / source / "adapter_config.json"
        content = json.loads(file.read_text())
        content["adapter"] = other
        file.write_text(json.dumps({key: value for key, value in content.items() if not key.startswith("bas")}))
        with pytest.raises(ValueError, match="adapter"):
            AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path / source)


def test_trainer_resumes_them_and_refuses_another_kind(tmp_path: Path) -> None:
    rows = [{"input_ids": [1, 5 + i, 7, 9], "labels": [1, 5 + i, 7, 9]} for i in range(8)]

    def run(source: str | None, steps: int, resume: bool = False) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = get_peft_model(llama(), config(task_type="CAUSAL_LM", **(SOURCES[source] if source else {})))
        args = TrainingArguments(
            str(tmp_path), max_steps=steps, save_steps=2, per_device_train_batch_size=2, report_to="none", use_cpu=True,
            learning_rate=1e-2, lr_scheduler_type="constant",
        )  # fmt: skip
        Trainer(model, args, train_dataset=rows).train(resume_from_checkpoint=resume)
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    whole = run("nola by shape", 4)
    for folder in tmp_path.glob("checkpoint-4"):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    resumed = run("nola by shape", 4, resume=True)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    with pytest.raises(ValueError, match="has an adapter of kind 'nola', this model has adapter='lora'"):
        run(None, 6, resume=True)


def test_another_adapter_over_the_same_scaffold(tmp_path: Path) -> None:
    model = trained("randlora")
    model.save_pretrained(tmp_path / "one")
    first = logits(model)
    other = trained("nola by layer")
    other.save_pretrained(tmp_path / "two")
    second = logits(other)
    again = AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path / "one")
    again.load_adapter(tmp_path / "two", "two")
    assert torch.equal(logits(again), first)
    again.set_adapter("two")
    assert torch.equal(logits(again), second)
    again.delete_adapter("default")
    assert torch.equal(logits(again), second)


def test_after_another_scaffold_seed_the_bases_are_the_same(tmp_path: Path) -> None:
    model = trained("nola by shape")
    model.set_scaffold_seed(43)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_as_a_checkpoint_and_as_plain_lora(tmp_path: Path) -> None:
    model = trained("nola by shape")
    expected = logits(model)
    export_lora(model, tmp_path / "lora")
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "lora" / "base")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(plain, tmp_path / "lora" / "adapter")), expected)
    model = trained("randlora")
    expected = logits(model)
    export_dense(model, tmp_path / "dense")
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="its update is RandLoRA's, of full rank"):
        export_lora(model, tmp_path / "none")


@pytest.mark.parametrize("source", SOURCES)
def test_ranks_and_alphas_by_pattern(source: str, tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"q_proj": 3, "o_proj": 40}, "alpha_pattern": {"q_proj": 5}}
    model = trained(source, **patterns)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    scalings = {a.path.rpartition(".")[2]: a.scaling for a in model.get_plan().adapters}
    alpha = model.peft_config["default"].lora_alpha
    assert scalings == {"q_proj": 5 / 3, "k_proj": alpha / 4, "v_proj": alpha / 4, "o_proj": alpha / 40}


# ---- sizes and counts of the papers ----------------------------------------------------------------------------------


def planned(sizes: dict[str, Any], **options: Any) -> Any:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    model.tie_weights()  # older versions do not without memory
    frozen = {"redraw": "none", "embeddings": "frozen", "norms": "frozen", "head": None, "task_type": "CAUSAL_LM"}
    if not sizes.get("tie_word_embeddings"):
        frozen["exclude_modules"] = ["lm_head"]
    return make_plan(model, config(**{**frozen, **options}))


LLAMA_2 = {
    "7B": ({"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}, 128, 57_344),
    "13B": (
        {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
        256,
        143_360,
    ),
    "70B": (
        {
            "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
            "num_key_value_heads": 8,
        },
        512,
        573_440,
    ),
}  # fmt: skip


def in_linears(plan: Any) -> int:
    return sum(a.numel - 1 for a in plan.adapters if a.path.rpartition(".")[2] != "lm_head")


@pytest.mark.parametrize("size", LLAMA_2)
def test_nola_trains_as_many_numbers_as_its_paper_says(size: str) -> None:
    sizes, k, count = LLAMA_2[size]
    plan = planned({**sizes, "tie_word_embeddings": True}, adapter="nola", bases=k, target_modules="all-linear")
    assert in_linears(plan) == count and len(plan.adapters) == count // (2 * k)


RANDLORA = {
    "RoBERTa-base": (768, 3072, 12, 64, 718_848),
    "RoBERTa-large": (1024, 4096, 24, 100, 1_780_416),
}


@pytest.mark.parametrize("size", RANDLORA)
def test_randlora_trains_as_many_as_its_paper_says(size: str) -> None:
    from transformers import RobertaConfig, RobertaModel

    hidden, between, layers, r, count = RANDLORA[size]
    sizes = {"hidden_size": hidden, "intermediate_size": between, "num_hidden_layers": layers}
    with torch.device("meta"):
        model = RobertaModel(RobertaConfig(**sizes, num_attention_heads=16 if hidden == 1024 else 12))
    targets = r".*encoder\.layer.*\.(query|key|value|dense)"
    plan = make_plan(model, config(r=r, adapter="randlora", redraw="none", target_modules=targets))
    assert sum(a.numel - 1 for a in plan.adapters) == count


SMALL = {
    "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4,
    "tie_word_embeddings": True,
}  # fmt: skip


@pytest.mark.parametrize(("r", "count"), [(8, 236_544), (16, 121_856), (32, 64_512)])
def test_randlora_on_the_small_llama(r: int, count: int) -> None:
    plan = planned(SMALL, adapter="randlora", r=r, target_modules="all-linear")
    assert sum(a.numel - 1 for a in plan.adapters) == count
    if r == 8:
        assert plan.artifact_bytes() <= 1_000_000  # PEFT's with projections: 59.1 MB


LLAMA_3 = {
    "8B": (
        {
            "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "vocab_size": 128_256,
        },
        30, ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"], 56_626_112,
    ),
    "3.2-3B": (
        {
            "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
            "num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": True,
        },
        32, ["q_proj", "v_proj"], 9_289_728,
    ),
}  # fmt: skip


@pytest.mark.parametrize("size", LLAMA_3)
def test_randlora_on_llama_3(size: str) -> None:
    sizes, r, targets, count = LLAMA_3[size]
    plan = planned({**sizes, "tie_word_embeddings": True}, adapter="randlora", r=r, target_modules=targets)
    assert sum(a.numel - 1 for a in plan.adapters) == count
    if size == "3.2-3B":
        assert plan.artifact_bytes() <= 35.6 * 2**20  # PEFT's with projections: 2,108.8 MiB


def test_nola_on_70b_is_a_small_file() -> None:
    sizes, k, _ = LLAMA_2["70B"]
    options = {"adapter": "nola", "bases": k, "target_modules": "all-linear", "save_dtype": "float16"}
    assert planned({**sizes, "tie_word_embeddings": True}, **options).artifact_bytes() <= 1_400_000


def test_the_header_says_float16(tmp_path: Path) -> None:
    model = get_peft_model(llama(), config(adapter="nola", bases=64, save_dtype="float16", task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        part = file.get_slice("lottalora_stacked.lora_A.coefficients")
        assert part.get_dtype() == "F16" and part.get_shape() == [8, 64]
