from __future__ import annotations

import math
from typing import Any

import pytest
import sizes
import torch
from accelerate import init_empty_weights
from paper import TOTALS
from peft import get_peft_model
from tiny import bert, config, gpt2, llama, mlp, perturb, t5, vit
from torch import nn
from transformers import LlamaForCausalLM, OPTConfig, OPTForCausalLM

from hf_lottalora import Plan, make_plan


def roles(plan: Plan) -> dict[str, str]:
    return {tensor.path: tensor.role for tensor in plan.tensors}


@pytest.mark.parametrize("scale", TOTALS)
def test_internal_parameters_equal_the_papers(scale: str) -> None:
    with init_empty_weights(include_buffers=False):
        model = LlamaForCausalLM(sizes.architecture(scale))
    model.tie_weights()
    for r, count in zip(sizes.RANKS, sizes.SCALES[scale][-1], strict=True):
        plan = make_plan(model, config(r=r, lora_alpha=16))
        assert plan.adapter_parameters == count
        assert plan.total_parameters - count == TOTALS[scale]


def test_roles_of_a_llama() -> None:
    layer = {
        f"model.layers.{i}.{name}": role
        for i in range(2)
        for role, names in {
            "scaffold": [f"self_attn.{p}_proj.weight" for p in "qkvo"] + [f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")],
            "trained": ["input_layernorm.weight", "post_attention_layernorm.weight"],
        }.items()
        for name in names
    }  # fmt: skip
    plan = make_plan(llama(), config())
    assert roles(plan) == {**layer, "model.embed_tokens.weight": "trained", "model.norm.weight": "trained"}
    embedding = next(t for t in plan.tensors if t.path == "model.embed_tokens.weight")
    assert embedding.name == "embed_tokens.weight"
    assert set(embedding.survey.aliases) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert {a.path for a in plan.adapters} == {f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qkvo"}


def test_an_untied_head_is_trained_apart() -> None:
    plan = make_plan(llama(tie_word_embeddings=False), config(embeddings="frozen"))
    assert roles(plan)["lm_head.weight"] == "trained" and roles(plan)["model.embed_tokens.weight"] == "scaffold"


def test_roles_of_a_bert() -> None:
    found = roles(make_plan(bert(), config()))
    assert found["bert.embeddings.position_embeddings.weight"] == "trained"
    assert found["bert.embeddings.LayerNorm.bias"] == "trained"
    assert found["bert.encoder.layer.0.intermediate.dense.weight"] == "scaffold"
    assert found["bert.encoder.layer.0.intermediate.dense.bias"] == "kept"
    assert found["bert.pooler.dense.weight"] == "scaffold"
    assert found["classifier.weight"] == found["classifier.bias"] == "trained"
    assert "scaffold" not in {role for path, role in found.items() if path.endswith("bias")}


def test_roles_of_a_vit_with_bare_parameters() -> None:
    for embeddings, role in (("train", "trained"), ("frozen", "scaffold")):
        found = roles(make_plan(vit(), config(embeddings=embeddings)))
        assert found["vit.embeddings.cls_token"] == found["vit.embeddings.position_embeddings"] == role
        assert found["vit.embeddings.patch_embeddings.projection.weight"] == "scaffold"


@pytest.mark.parametrize(
    ("changes", "path", "role"),
    [
        ({"norms": "frozen"}, "bert.encoder.layer.0.output.LayerNorm.weight", "kept"),
        ({"biases": "train"}, "bert.encoder.layer.0.output.dense.bias", "trained"),
        ({"embeddings": "frozen"}, "bert.embeddings.word_embeddings.weight", "scaffold"),
        ({"embeddings": "lora"}, "bert.embeddings.word_embeddings.weight", "scaffold"),
        ({"embeddings": "lora"}, "bert.embeddings.position_embeddings.weight", "trained"),
        ({"head": "lora"}, "classifier.weight", "scaffold"),
        ({"head": "lora"}, "classifier.bias", "kept"),
        ({"modules_to_save": ["pooler"]}, "bert.pooler.dense.weight", "trained"),
        ({"redraw": "targets"}, "bert.encoder.layer.0.attention.self.query.weight", "scaffold"),
        ({"redraw": "targets"}, "bert.encoder.layer.0.output.dense.weight", "kept"),
        ({"redraw": "targets"}, "bert.embeddings.word_embeddings.weight", "trained"),
        ({"redraw": "none"}, "bert.encoder.layer.0.attention.self.query.weight", "kept"),
        ({"redraw": "none"}, "classifier.weight", "trained"),
    ],
)
def test_options_change_roles(changes: dict[str, Any], path: str, role: str) -> None:
    assert roles(make_plan(bert(), config(**changes)))[path] == role


def test_scales() -> None:
    plan = make_plan(gpt2(), config(embeddings="frozen"))
    scale = {path: spec.scale for path, spec in plan.scaffold.items()}
    assert scale["transformer.h.0.attn.c_attn.weight"] == 1 / math.sqrt(32)  # Conv1D holds (in, out)
    assert scale["transformer.h.0.mlp.c_proj.weight"] == 1 / math.sqrt(128)
    assert scale["transformer.wte.weight"] == scale["transformer.wpe.weight"] == 0.02
    patches = make_plan(vit(), config()).scaffold["vit.embeddings.patch_embeddings.projection.weight"]
    assert patches.scale == 1 / math.sqrt(1 * 4 * 4)
    fixed = make_plan(gpt2(), config(scale=0.3)).scaffold["transformer.h.0.attn.c_attn.weight"]
    assert fixed.scale == 0.3
    own = make_plan(gpt2(initializer_range=0.7), config(scale="initializer_range"))
    assert own.scaffold["transformer.h.0.attn.c_attn.weight"].scale == 0.7


def test_names_are_shared_by_all_heads_of_an_architecture() -> None:
    backbone = llama().model
    assert make_plan(backbone, config()).scaffold_digests() == make_plan(llama(), config()).scaffold_digests()


def test_padding_rows() -> None:
    plan = make_plan(bert(pad_token_id=3), config(embeddings="frozen"))
    assert plan.scaffold["bert.embeddings.word_embeddings.weight"].zero_row == 3
    assert plan.scaffold["bert.embeddings.position_embeddings.weight"].zero_row is None


def test_targets() -> None:
    def targets(model: nn.Module, **changes: Any) -> set[str]:
        return {adapter.path for adapter in make_plan(model, config(**changes)).adapters}

    everything = targets(llama(), target_modules="all-linear")
    assert len(everything) == 14 and "lm_head" not in everything
    assert targets(llama(), target_modules=["q_proj"]) == {f"model.layers.{i}.self_attn.q_proj" for i in range(2)}
    assert targets(llama(), target_modules=r".*\.1\..*up_proj") == {"model.layers.1.mlp.up_proj"}
    one = targets(llama(), target_modules=["q_proj"], layers_to_transform=[1])
    assert one == {"model.layers.1.self_attn.q_proj"}
    assert "model.layers.0.mlp.up_proj" not in targets(
        llama(), target_modules="all-linear", exclude_modules=["up_proj"]
    )
    assert "classifier" not in targets(bert(), target_modules=["classifier", "query"])  # trained as a whole
    assert "classifier" in targets(bert(), head="lora")
    ranks = make_plan(llama(), config(rank_pattern={"q_proj": 2})).adapters
    assert {(a.path.rpartition(".")[2], a.r) for a in ranks} == {
        ("q_proj", 2),
        ("k_proj", 4),
        ("v_proj", 4),
        ("o_proj", 4),
    }


class WithQuantised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.a.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (
            mlp,
            {},
            r"no default target_modules for a plain nn.Module. Pass target_modules; its linear layers are: 0, 2, 4",
        ),
        (
            mlp,
            {"target_modules": ["nope"]},
            r"target_modules=\['nope'\] matches no linear layer, convolution or embedding of Seq",
        ),
        (mlp, {"target_modules": ["4"], "modules_to_save": ["4"]}, "matches no linear layer, .* trained as a whole"),
        (mlp, {"target_modules": ["0"], "modules_to_save": ["9"]}, "modules_to_save names '9', but Sequential has no"),
        (llama, {"target_modules": ["embed_tokens"], "residual": True}, "residual is for layers that multiply, and"),
        (t5, {"target_modules": ["shared"]}, r"looked up through several modules \(shared, encoder.embed_tokens, "),
        (llama, {"head": "train", "embeddings": "frozen"}, r"tied .* head='train' and embeddings='frozen' disagree"),
        (vit, {"embeddings": "lora", "target_modules": "all-linear"}, "names none. Pass embeddings='train' or"),
        (t5, {"embeddings": "lora"}, r"looked up through several modules \(shared, encoder.embed_tokens, decoder"),
        (llama, {"head": "lora"}, "head='lora' and embeddings='train' disagree"),
        (
            llama,
            {"modules_to_save": ["lm_head"], "embeddings": "lora"},
            "modules_to_save trains .* embeddings='lora' says",
        ),
    ],
)
def test_impossible_plans_are_refused_and_change_nothing(model: Any, changes: dict[str, Any], message: str) -> None:
    built = model()
    before = {name: value.clone() for name, value in built.state_dict().items()}
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        get_peft_model(built, config(**changes))
    after = built.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(state, torch.get_rng_state())


def test_an_architecture_is_no_model() -> None:
    with pytest.raises(TypeError, match="make_plan takes a model, got a LlamaConfig"):
        make_plan(llama().config, config())


def test_a_quantised_weight_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'a.weight' has dtype torch.int8: a quantised weight cannot be drawn over"):
        make_plan(WithQuantised(), config(target_modules=["a"]))


def test_two_tensors_of_one_canonical_name_are_refused() -> None:
    model = bert()
    model.pooler = model.bert.pooler.__class__(model.config)  # beside bert.pooler: the same name below the base
    with pytest.raises(ValueError, match=r"'bert.pooler.dense.weight'|would both be drawn under the canonical name"):
        make_plan(model, config())


def test_lora_embeddings_adapt_the_token_embedding_alone() -> None:
    sizes = {"vocab_size": 99, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=32, max_position_embeddings=4096))
    plan = make_plan(model, config(embeddings="lora"))
    assert roles(plan)["model.decoder.embed_positions.weight"] == "trained"
    assert {a.path for a in plan.adapters if a.kind == "embedding"} == {"model.decoder.embed_tokens"}


def test_the_plan_prints_sizes_and_shares() -> None:
    plan = make_plan(llama(), config())
    text = str(plan)
    assert "LottaLoRA plan for LlamaForCausalLM, seed 42" in text
    assert f"trainable {plan.trainable_parameters:,} of {plan.total_parameters:,}" in text
    assert "scaffold  model.layers.*.mlp.up_proj.weight" in text and "adapter   model.layers.*.self_attn.q_proj" in text


@pytest.mark.parametrize(
    "changes",
    [{}, {"embeddings": "lora"}, {"embeddings": "frozen", "norms": "frozen"}, {"save_dtype": "int8"}],
)
def test_the_plan_counts_what_is_trained_and_written(tmp_path: Any, changes: dict[str, Any]) -> None:
    model = get_peft_model(bert(), config(**changes))
    plan = model.get_plan()
    trainable, total = model.get_nb_trainable_parameters()
    assert (trainable, total) == (plan.trainable_parameters, plan.total_parameters)
    perturb(model)  # else rows of embeddings are as drawn, and not stored
    model.save_pretrained(tmp_path)
    written = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert abs(written - plan.artifact_bytes()) <= 64


@pytest.mark.parametrize("module", [nn.GRU(8, 8), nn.LSTMCell(8, 8)])
def test_recurrent_modules_are_drawn_and_carry_no_adapter(module: nn.Module) -> None:
    model = nn.ModuleDict({"cell": module, "head": nn.Linear(8, 2)})
    plan = make_plan(model, config(target_modules=["head"]))
    matrices = {f"cell.{name}" for name, p in module.named_parameters() if p.dim() == 2}
    assert matrices and matrices <= plan.scaffold.keys()
    with pytest.raises(ValueError, match=rf"target_modules matches 'cell', a {type(module).__name__}. Adapters go on"):
        make_plan(model, config(target_modules=["cell"]))
