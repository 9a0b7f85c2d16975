from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.mapping import inject_adapter_in_model
from tiny import bert, config, gpt2, ids, llama, logits, mlp, perturb, vit
from torch import nn
from transformers import LlamaForCausalLM


def trainable(model: nn.Module) -> set[str]:
    prefix = "base_model.model."
    return {name.removeprefix(prefix) for name, p in model.named_parameters() if p.requires_grad}


def adapter_names(paths: list[str]) -> set[str]:
    kinds = ("lora_A.default.weight", "lora_B.default.weight", "lora_beta.default.norm")
    return {f"{path}.{kind}" for path in paths for kind in kinds}


LLAMA_TARGETS = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qkvo"]
LLAMA_NORMS = {"model.norm.weight"} | {
    f"model.layers.{i}.{name}.weight" for i in range(2) for name in ("input_layernorm", "post_attention_layernorm")
}


def test_trainable_set_of_a_llama() -> None:
    model = get_peft_model(llama(), config())
    assert trainable(model) == adapter_names(LLAMA_TARGETS) | LLAMA_NORMS | {"model.embed_tokens.weight"}
    frozen = get_peft_model(llama(), config(embeddings="frozen", norms="frozen"))
    assert trainable(frozen) == adapter_names(LLAMA_TARGETS)


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
def test_trainable_set_of_a_bert(task_type: str | None) -> None:
    settings = config(task_type=task_type, biases="train")
    model = get_peft_model(bert(), settings)
    attention = [
        f"bert.encoder.layer.{i}.attention.{name}"
        for i in range(2)
        for name in ("self.query", "self.key", "self.value", "output.dense")
    ]
    dense = [f"bert.encoder.layer.{i}.{name}.dense" for i in range(2) for name in ("intermediate", "output")]
    norms = ["bert.embeddings.LayerNorm"] + [
        f"bert.encoder.layer.{i}.{name}.LayerNorm" for i in range(2) for name in ("attention.output", "output")
    ]
    expected = adapter_names(attention)
    expected |= {f"{path}.base_layer.bias" for path in attention} | {f"{path}.bias" for path in dense}
    expected |= {f"{path}.{kind}" for path in norms for kind in ("weight", "bias")}
    expected |= {f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")}
    expected |= {"classifier.weight", "classifier.bias", "bert.pooler.dense.bias"}
    assert trainable(model) == expected


@pytest.mark.parametrize("build", [llama, bert, gpt2, vit])
@pytest.mark.parametrize("redraw", ["all", "targets", "none"])
def test_everything_trainable_gets_a_gradient(build: Any, redraw: str) -> None:
    model = get_peft_model(build(), config(redraw=redraw, biases="train", init_lora_weights=False))
    inputs = {"pixel_values": torch.ones(2, 1, 8, 8)} if build is vit else {"input_ids": ids()}
    model(**inputs).logits.square().sum().backward()
    without = {name for name in trainable(model) if dict(model.base_model.model.named_parameters())[name].grad is None}
    # An unused position or token type gets a zero row, not no gradient; nothing else is left out.
    assert without == set()


def test_noise_on_a_pretrained_network_replaces_the_targets_alone() -> None:
    base = llama()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    get_peft_model(base, config(redraw="targets"))
    after = {name.replace(".base_layer", ""): value for name, value in base.state_dict().items() if "lora_" not in name}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{path}.weight" for path in LLAMA_TARGETS}


def test_keeping_the_weights_is_lora_with_beta() -> None:
    base = llama()
    expected = logits(base)
    model = get_peft_model(base, config(redraw="none", init_lora_weights=True))
    assert torch.equal(logits(model), expected)
    assert not model.get_plan().scaffold


def test_drawing_over_loaded_weights_warns_once_and_names_redraw(tmp_path: Any) -> None:
    llama().save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"redraw='all' draws over weights that were loaded from") as caught:
        model = get_peft_model(loaded, config())
    assert len([w for w in caught if "redraw" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.add_adapter("second", config())
        get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path), config(redraw="none"))
        get_peft_model(LlamaForCausalLM(loaded.config), config())


def test_two_adapters_share_one_scaffold_and_switch_exactly() -> None:
    model = get_peft_model(llama(), config()).eval()
    start = logits(model)
    model.add_adapter("other", config(adapter_seed=1, r=2, embeddings="lora"))
    assert torch.equal(logits(model), start)  # adding changes nothing
    perturb(model)
    first = logits(model)
    model.set_adapter("other")
    assert trainable(model) >= {f"{LLAMA_TARGETS[0]}.lora_A.other.weight", *LLAMA_NORMS}
    assert not any("default" in name or "embed_tokens.base_layer" in name for name in trainable(model))
    perturb(model)
    second = logits(model)
    assert not torch.equal(first, second)
    for _ in range(2):
        model.set_adapter("default")
        assert torch.equal(logits(model), first)
        model.set_adapter("other")
        assert torch.equal(logits(model), second)
    with model.disable_adapter():
        base = logits(model)
    assert torch.equal(base, start)  # trained tensors are as drawn, B A is zero and beta one
    assert torch.equal(logits(model), second)
    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        model.delete_adapter("other")
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    assert not any("other" in name for name in model.state_dict())


def test_disable_adapter_gives_back_pretrained_values_too() -> None:
    base = llama()
    expected = logits(base)
    model = get_peft_model(base, config(redraw="none")).eval()
    perturb(model)
    trained = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
        assert trainable(model) == set()
    assert torch.equal(logits(model), trained) and len(trainable(model)) > 20
    assert torch.equal(logits(model.unload()), expected)


def test_tied_embeddings_stay_tied() -> None:
    model = get_peft_model(llama(), config())
    base = model.base_model.model

    def tied() -> bool:
        return base.lm_head.weight is base.model.embed_tokens.weight

    assert tied() and base.lm_head.weight.requires_grad
    with model.disable_adapter():
        assert tied() and not base.lm_head.weight.requires_grad
    assert tied()
    model(input_ids=ids(), labels=ids()).loss.backward()
    assert base.lm_head.weight.grad is not None and tied()
    assert tied() and len([n for n in trainable(model) if "embed" in n or "head" in n]) == 1


@pytest.mark.parametrize(
    ("option", "value"), [("seed", 43), ("family", "binary"), ("scale", 0.1), ("redraw", "targets")]
)
def test_an_adapter_over_another_scaffold_is_refused(option: str, value: Any) -> None:
    model = get_peft_model(llama(), config())
    keys = set(model.state_dict())
    mine = getattr(config(), option)
    with pytest.raises(ValueError, match=f"'other' has {option}={value!r}.* was made with {option}={mine!r}"):
        model.add_adapter("other", config(**{option: value}))
    assert set(model.state_dict()) == keys and set(model.peft_config) == {"default"}


def test_other_targets_under_redraw_targets_are_refused() -> None:
    model = get_peft_model(llama(), config(redraw="targets"))
    with pytest.raises(
        ValueError, match="'other' needs 'model.layers.0.self_attn.q_proj.weight' as it was, but .* made it drawn"
    ):
        model.add_adapter("other", config(redraw="targets", target_modules=["up_proj"]))


def test_several_active_adapters() -> None:
    options = {"target_modules": ["0", "2"]}
    model = get_peft_model(mlp(), config(**options))
    model.add_adapter("other", config(**options, adapter_seed=3, init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    perturb(model)
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(model(x), merged(x), rtol=1e-4, atol=1e-5)


def test_two_trained_copies_of_a_tensor_cannot_be_active_together() -> None:
    model = get_peft_model(llama(), config())
    model.add_adapter("other", config())
    with pytest.raises(ValueError, match=r"\['default', 'other'\] cannot be active together.*embed_tokens.weight"):
        model.base_model.set_adapter(["default", "other"])
    assert model.active_adapters == ["default"]


def test_mixed_batches() -> None:
    frozen = {"embeddings": "frozen", "norms": "frozen"}
    model = get_peft_model(llama(), config(**frozen)).eval()
    model.add_adapter("other", config(**frozen, adapter_seed=9))
    for name in ("default", "other"):
        model.set_adapter(name)
        perturb(model)
    expected = []
    for name in ("other", "default"):
        model.set_adapter(name)
        expected.append(logits(model)[len(expected)])
    with torch.no_grad():
        mixed = model(ids(), adapter_names=["other", "default"]).logits
    torch.testing.assert_close(mixed, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_what_is_not_supported_says_why() -> None:
    model = get_peft_model(llama(), config())
    with pytest.raises(ValueError, match="add_weighted_adapter is not supported: a LottaLoRA adapter also scales"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    with pytest.raises(ValueError, match="does not support .*LOTTALORA because it uses shared state"):
        inject_adapter_in_model(config(), llama())


def test_verify_scaffold_names_the_changed_tensor() -> None:
    model = get_peft_model(llama(), config())
    model.verify_scaffold()
    weight = model.base_model.model.model.layers[1].mlp.up_proj.weight
    weight.data[3, 4] += 1
    with pytest.raises(ValueError, match=r"'model.layers.1.mlp.up_proj.weight' is not what seed 42 draws"):
        model.verify_scaffold(full=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_scaffold_in_every_dtype(dtype: torch.dtype) -> None:
    drawn = get_peft_model(llama().to(dtype), config())
    drawn.verify_scaffold(full=True)
    cast = get_peft_model(llama(), config()).to(dtype)
    cast.verify_scaffold(full=True)


def test_adding_a_target_changes_no_other_tensor() -> None:
    few = get_peft_model(llama(), config(target_modules=["q_proj"])).state_dict()
    many = get_peft_model(llama(), config(target_modules=["q_proj", "up_proj"])).state_dict()
    for name, value in few.items():
        other = many[name] if name in many else many[name.replace(".weight", ".base_layer.weight")]
        assert torch.equal(value, other), name


def test_deepcopy_keeps_adapters_and_ties_apart() -> None:
    model = get_peft_model(llama(), config(embeddings="lora"))
    twin = copy.deepcopy(model)
    perturb(twin)
    assert not torch.equal(logits(model), logits(twin))
    head, embedding = twin.base_model.model.lm_head, twin.base_model.model.model.embed_tokens
    assert head.embedding is embedding and head.base_layer.weight is embedding.base_layer.weight
    assert isinstance(twin, PeftModel)


def test_ddp_ignores_exactly_the_scaffold() -> None:
    model = get_peft_model(llama(), config())
    ignored = set(model._ddp_params_and_buffers_to_ignore)
    named = dict(model.named_parameters(remove_duplicate=False))
    assert ignored == {name for name, parameter in named.items() if not parameter.requires_grad}
    assert "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight" in ignored


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    grads = []
    for checkpointing in (False, True):
        model = get_peft_model(llama(), config(init_lora_weights=False)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=ids(), labels=ids()).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("embeddings", ["train", "lora"])
def test_the_usual_things_one_does_with_a_peft_model(embeddings: str) -> None:
    model = get_peft_model(llama(), config(embeddings=embeddings, task_type="CAUSAL_LM")).eval()
    perturb(model)
    expected = logits(model)
    assert model.get_model_status().enabled and model.get_model_status().active_adapters == ["default"]
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)
    assert model.generate(ids(), max_new_tokens=2, do_sample=False).shape == (2, 9)
    assert repr(model.base_model.model.model.layers[0].self_attn.q_proj).startswith("lottalora.Linear(32 -> 32, ")
