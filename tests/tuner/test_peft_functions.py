"""PEFT's public functions that take a model or an adapter: each right, or refused by name. docs/peft.md has the table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft.functional
import pytest
import torch
from peft import (
    ArrowConfig,
    AutoPeftModelForCausalLM,
    EvaConfig,
    LoraConfig,
    LoraModel,
    PeftMixedModel,
    PeftModel,
    XLoraConfig,
    cast_mixed_precision_params,
    convert_to_lora,
    create_arrow_model,
    find_kappa_target_modules,
    get_base_model_state_dict,
    get_eva_state_dict,
    get_layer_status,
    get_model_status,
    get_peft_config,
    get_peft_model,
    get_peft_model_state_dict,
    initialize_lora_eva_weights,
    inject_adapter_in_model,
    load_peft_weights,
    prepare_model_for_kbit_training,
    preprocess_loraga,
    replace_lora_weights_loftq,
    save_as_lora,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from peft.helpers import (
    DoraCaching,
    check_if_peft_model,
    disable_input_dtype_casting,
    rescale_adapter_scale,
    update_signature,
)
from peft.optimizers import create_lorafa_optimizer, create_riemannian_optimizer
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.intruders import reduce_intruder_dimension
from peft.utils.hotswap import hotswap_adapter, hotswap_adapter_from_state_dict, prepare_model_for_compiled_hotswap
from tiny import config, ids, llama, logits, perturb
from torch import nn

from hf_lottalora import AutoLottaLoraModelForCausalLM

MODES = ["dense", "packed", "streamed"]
BATCHES = [{"input_ids": ids(), "attention_mask": torch.ones_like(ids())}]


def made(**options: Any) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(llama(), config(task_type="CAUSAL_LM", **options)).eval()
    perturb(model)
    return model


def artifact(folder: Path, **options: Any) -> str:
    made(**options).save_pretrained(folder)
    return str(folder)


REFUSED: dict[str, tuple[type[Exception], str, Callable[[PeftModel, str], Any]]] = {
    "convert_to_lora": (
        TypeError,
        "do not support LoRA conversion: .*ScaffoldLinear",
        lambda model, path: convert_to_lora(model, 4),
    ),
    "save_as_lora": (
        TypeError,
        "do not support LoRA conversion: .*ScaffoldLinear",
        lambda model, path: save_as_lora(Path(path) / "lora", model, 4),
    ),
    "inject_adapter_in_model": (
        ValueError,
        "does not support PeftType.LOTTALORA because it uses shared state",
        lambda model, path: inject_adapter_in_model(config(), llama()),
    ),
    "transformers' load_adapter": (
        ValueError,
        "does not support PeftType.LOTTALORA because it uses shared state",
        lambda model, path: llama().load_adapter(path),
    ),
    "get_peft_model(mixed=True)": (
        ValueError,
        "'LOTTALORA' is not compatible with the `PeftMixedModel`",
        lambda model, path: get_peft_model(llama(), config(), mixed=True),
    ),
    "PeftMixedModel.from_pretrained": (
        ValueError,
        "Adapter of type PeftType.LOTTALORA is not supported for mixed models",
        lambda model, path: PeftMixedModel.from_pretrained(llama(), path),
    ),
    "PeftMixedModel.add_adapter": (
        ValueError,
        "'LOTTALORA' is not compatible with the `PeftMixedModel`",
        lambda model, path: get_peft_model(llama(), LoraConfig(r=2), mixed=True).add_adapter("other", config()),
    ),
    "add_adapter(LoraConfig)": (
        ValueError,
        "Cannot combine adapters with different peft types",
        lambda model, path: model.add_adapter("other", LoraConfig(r=2)),
    ),
    "a LoRA over LottaLoRA": (
        ValueError,
        r"A LoraConfig would put its adapter into the layers of a LottaLoRA model. Call merge_and_unload\(\)",
        lambda model, path: get_peft_model(model, LoraConfig(r=2)),
    ),
    "LottaLoRA over a LoRA": (
        ValueError,
        "The base model already carries adapters",
        lambda model, path: get_peft_model(get_peft_model(llama(), LoraConfig(r=2)), config()),
    ),
    "hotswap_adapter": (
        ValueError,
        "Hotswapping only supports LORA but LOTTALORA was passed",
        lambda model, path: hotswap_adapter(model, path, "default"),
    ),
    "hotswap_adapter_from_state_dict": (
        KeyError,
        "embed_tokens.weight",
        lambda model, path: hotswap_adapter_from_state_dict(model, load_peft_weights(path), "default", config()),
    ),
    "set_peft_model_state_dict(ignore_mismatched_sizes=True)": (
        ValueError,
        r"has '.*lora_A.weight' with shape \(2, 32\), expected \(4, 32\). Nothing was loaded",
        lambda model, path: set_peft_model_state_dict(
            model, get_peft_model_state_dict(made(r=2)), ignore_mismatched_sizes=True
        ),
    ),
    "peft.functional.set_adapter": (
        ValueError,
        r"set_adapter of a layer, or of peft.functional, leaves out what adapters \['default'\] train beside the layers",
        lambda model, path: peft.functional.set_adapter(model, "default"),
    ),
    "peft.functional.set_requires_grad": (
        ValueError,
        "Call the model's own set_requires_grad",
        lambda model, path: peft.functional.set_requires_grad(model, "default", False),
    ),
    "peft.functional.delete_adapter": (
        ValueError,
        "Call the model's own delete_adapter",
        lambda model, path: peft.functional.delete_adapter(model, "default", "lora_"),
    ),
    "replace_lora_weights_loftq": (
        ValueError,
        "bitsandbytes must be installed and the model must be quantized",
        lambda model, path: replace_lora_weights_loftq(model),
    ),
    "initialize_lora_eva_weights": (
        ValueError,
        "can only be used with `init_lora_weights='eva'`",
        lambda model, path: initialize_lora_eva_weights(model, BATCHES),
    ),
    "preprocess_loraga": (
        ValueError,
        "please initialize the LoraConfig with init_lora_weights='lora_ga'",
        lambda model, path: preprocess_loraga(llama(), config(), lambda: None),
    ),
    "preprocess_corda": (
        AttributeError,
        "cache_file",  # of corda_config, which is None
        lambda model, path: preprocess_corda(llama(), config(), lambda: None),
    ),
    "reduce_intruder_dimension": (
        ValueError,
        "The provided model is not using LoRA",
        lambda model, path: reduce_intruder_dimension(model),
    ),
    "create_arrow_model": (
        ValueError,
        "Cannot combine adapters with different peft types",
        lambda model, path: create_arrow_model(llama(), [path, path], ArrowConfig()),
    ),
    "LoraModel": (
        ValueError,
        "A LottaLoRA adapter was given to PEFT's LoRA tuner, which draws no scaffold. Use get_peft_model",
        lambda model, path: LoraModel(llama(), config(target_modules=["q_proj"]), "default"),
    ),
    "XLoraConfig": (
        ValueError,
        "A LottaLoRA adapter was given to PEFT's LoRA tuner, which draws no scaffold. Use get_peft_model",
        lambda model, path: get_peft_model(
            llama(use_cache=False),
            XLoraConfig(adapters={"0": path}, hidden_size=32, task_type="CAUSAL_LM"),
        ),
    ),
}


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model")
@pytest.mark.parametrize("name", REFUSED)
def test_refused_and_nothing_changed(name: str, tmp_path: Path) -> None:
    error, message, call = REFUSED[name]
    path = artifact(tmp_path)
    model = made()
    expected, state = logits(model), {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        call(model, path)
    assert torch.equal(logits(model), expected)
    assert all(torch.equal(value, state.pop(key)) for key, value in model.state_dict().items()) and not state
    assert not (tmp_path / "lora" / "adapter_model.safetensors").exists()


def test_conversion_is_denied_when_asked() -> None:
    for options in ({}, {"embeddings": "lora"}, {"use_dora": True}):
        assert made(**options).supports_lora_conversion() is False


def test_status() -> None:
    for options in ({}, {"embeddings": "lora", "residency": "packed"}, {"train_beta": False}):
        model = made(**options)
        layers, status = get_layer_status(model), get_model_status(model)
        assert {layer.name.removeprefix("model.") for layer in layers} == {a.path for a in model.get_plan().adapters}
        assert status.peft_types == {"default": "LOTTALORA"} and status.adapter_model_type == "LottaLoraModel"
        assert status.trainable_params == model.get_plan().trainable_parameters
        # PEFT's word for parameters of which some are frozen.
        assert status.requires_grad == {"default": True if model.get_plan().adapters[0].train_beta else "irregular"}
        assert status.enabled is True and status.merged_adapters == [] and status.devices == {"default": ["cpu"]}


def test_loading_weights_and_configs(tmp_path: Path) -> None:
    model, path = made(), artifact(tmp_path)
    assert load_peft_weights(path).keys() == get_peft_model_state_dict(model).keys()
    assert check_if_peft_model(path) is True and check_if_peft_model(str(tmp_path / "nothing")) is False
    assert get_peft_config(config(r=3).to_dict()).r == 3
    other = get_peft_model(llama(), config(task_type="CAUSAL_LM"))
    set_peft_model_state_dict(other, load_peft_weights(path))
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cast_mixed_precision_params(dtype: torch.dtype, mode: str, tmp_path: Path) -> None:
    model = made(residency=mode)
    cast_mixed_precision_params(model, dtype)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {dtype}
    model.verify_scaffold(full=True)
    model.save_pretrained(tmp_path)
    again = AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("mode", MODES)
def test_prepare_model_for_kbit_training(mode: str) -> None:
    base = prepare_model_for_kbit_training(llama().bfloat16())
    before = get_peft_model(base, config(residency=mode))
    assert {p.dtype for p in before.parameters()} == {torch.float32}
    assert before.get_nb_trainable_parameters()[0] == before.get_plan().trainable_parameters
    before.verify_scaffold(full=True)
    after = made(residency=mode)
    expected = logits(after)
    prepare_model_for_kbit_training(after)  # of an adapted model it freezes everything, as in PEFT
    assert torch.equal(logits(after), expected) and not any(p.requires_grad for p in after.parameters())
    after.set_requires_grad("default")
    assert after.get_nb_trainable_parameters()[0] == after.get_plan().trainable_parameters


def test_prepare_model_for_compiled_hotswap(tmp_path: Path) -> None:
    model = made()
    expected = logits(model)
    prepare_model_for_compiled_hotswap(model)
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path)), expected)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    torch.testing.assert_close(logits(model), expected)
    with pytest.raises(ValueError, match=r"lora_A.weight' with shape \(8, 32\), expected \(4, 32\)"):
        model.save_pretrained(tmp_path)


def test_eva_looks_only() -> None:
    model = made()
    expected = logits(model)
    eva = LoraConfig(r=2, init_lora_weights="eva", eva_config=EvaConfig())
    found = get_eva_state_dict(model, BATCHES, eva, show_progress_bar=False)
    assert len(found) == len(model.get_plan().adapters) and torch.equal(logits(model), expected)
    with pytest.raises(AttributeError, match="rho"):  # of eva_config, which is None
        get_eva_state_dict(model, BATCHES, show_progress_bar=False)


def test_rescale_adapter_scale_is_for_the_low_rank_part() -> None:
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2)).double()
    model = get_peft_model(net, config(target_modules=["0"], modules_to_save=["1"]))
    perturb(model)
    layer, x = model.base_model.model[0], torch.randn(3, 6, dtype=torch.float64)
    A, B, base = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.base_layer
    (beta,) = model.get_betas().values()
    with rescale_adapter_scale(model, 0.5):
        expected = beta * x @ base.weight.T + 0.5 * 2.0 * x @ A.T @ B.T + base.bias
        torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x) - base.bias, beta * x @ base.weight.T + 2.0 * x @ A.T @ B.T)
    assert layer.scaling["default"] == 2.0


def test_contexts_that_have_nothing_to_do() -> None:
    half = get_peft_model(llama().bfloat16(), config())
    expected = logits(half)
    with disable_input_dtype_casting(half):  # inputs are never cast
        assert torch.equal(logits(half), expected)
    model = made(use_dora=True)
    with DoraCaching():
        logits(model)
        perturb(model)
        changed = logits(model)
    assert torch.equal(logits(model), changed)  # nothing was cached, so nothing is stale


def test_signatures() -> None:
    model = get_peft_model(llama(), config())
    expected = logits(model)
    update_signature(model)
    assert model.forward.__doc__ == type(model.get_base_model()).forward.__doc__
    assert torch.equal(logits(model), expected)


def test_kappa_targets_are_targets() -> None:
    torch.manual_seed(0)
    found = find_kappa_target_modules(llama(tie_word_embeddings=False))
    names = [name for name in found["target_modules"] if "layers" in name]
    model = get_peft_model(llama(tie_word_embeddings=False), config(target_modules=found["target_modules"]))
    assert names and {a.path for a in model.get_plan().adapters} == set(names)


@pytest.mark.parametrize("mode", MODES)
def test_base_model_state_dict(mode: str) -> None:
    model = made(residency=mode)
    expected, plain = logits(model), llama()
    state = get_base_model_state_dict(model)
    assert state.keys() == plain.state_dict().keys()
    plain.load_state_dict(state)  # what is live: with the adapter's embeddings and norms
    assert torch.equal(plain.model.norm.weight, model.base_model.model.model.norm.weight)
    set_base_model_state_dict(model, state)
    assert torch.equal(logits(model), expected)
    with model.disable_adapter():  # what the base model is without adapters
        plain.load_state_dict(get_base_model_state_dict(model))
        assert torch.equal(logits(plain.eval()), logits(model))


def test_a_kept_base_is_what_auto_classes_need(tmp_path: Path) -> None:
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "base")
    base = type(llama()).from_pretrained(tmp_path / "base")
    model = get_peft_model(base, config(redraw="none", task_type="CAUSAL_LM"))
    perturb(model)
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))


def test_riemannian_optimizer() -> None:
    results = []
    for precondition in (False, True):
        model = made().train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer: torch.optim.Optimizer = torch.optim.SGD(trained, lr=0.1)
        if precondition:
            optimizer = create_riemannian_optimizer(model, torch.optim.SGD, lr=0.1)
        model(input_ids=ids(), labels=ids()).loss.backward()
        optimizer.step()
        results.append(dict(model.named_parameters()))
    plain, preconditioned = results
    for name, parameter in plain.items():
        differs = not torch.equal(parameter, preconditioned[name])
        assert differs is (".lora_A." in name or ".lora_B." in name)


def test_functions_for_bare_layers() -> None:
    """`peft.functional` is for models without a tuner: of ours it reaches the layers, right where that is all there is."""
    model = made(embeddings="frozen", norms="frozen")
    model.add_adapter("other", config(embeddings="frozen", norms="frozen", adapter_seed=7))
    model.set_adapter("other")
    perturb(model)
    expected = logits(model)
    model.set_adapter("default")
    peft.functional.set_adapter(model, "other")
    assert torch.equal(logits(model), expected)
    peft.functional.set_requires_grad(model, "other", False)
    assert not any(p.requires_grad for p in model.parameters())
    peft.functional.set_adapter(model, "default")
    peft.functional.delete_adapter(model, "other", "lora_")
    assert not any(".other" in name for name in model.state_dict())


@pytest.mark.filterwarnings("ignore:The use of `x.T` on tensors")  # of a beta, which it takes for an A
def test_lorafa_optimizer_ends_in_an_error_of_pefts() -> None:
    """It takes parameters of a layer in pairs of A and B, and says so of nothing else; nothing of ours is asked."""
    model = get_peft_model(llama(num_hidden_layers=1), config())
    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-3)
    model(ids(), labels=ids()).loss.backward()
    with pytest.raises(TypeError):
        optimizer.step()
