"""Single rows of an embedding trained (`trainable_token_indices`), with PEFT's own as the oracle."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import bert, config, gpt2, ids, llama, logits, perturb, t5
from torch import nn

from hf_lottalora import AutoLottaLoraModelForCausalLM, make_plan

ROWS = [5, 3, 40]
REDRAW = ("all", "targets", "none")


def made(build: Any = llama, redraw: str = "none", **changes: Any) -> PeftModel:
    torch.manual_seed(0)
    settings = {"trainable_token_indices": ROWS, "norms": "frozen", "save_kept": redraw != "all", **changes}
    model = get_peft_model(build(), config(redraw=redraw, **settings)).eval()
    perturb(model)
    return model


def embedding(model: PeftModel) -> Any:
    return model.base_model.model.get_input_embeddings()


def table(layer: Any, name: str = "default") -> torch.Tensor:
    """The frozen table with the adapter's rows in their places, by the order of their ids."""
    index = torch.tensor(sorted(ROWS))
    weight: torch.Tensor = layer.get_base_layer().weight
    return weight.index_copy(0, index, layer.lora_rows[name])


@pytest.mark.parametrize("tied", [True, False])
def test_rows_in_the_table_and_in_the_head_tied_to_it(tied: bool) -> None:
    model = made(lambda: llama(tie_word_embeddings=tied)).double()
    layer, head = embedding(model), model.base_model.model.lm_head
    x = torch.tensor([[3, 4, 5, 40, 41, 0, 98, 3]])
    rows = layer.lora_rows["default"]
    expected = F.embedding(x, table(layer))
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)
    g = torch.randn(expected.shape, dtype=torch.float64)
    torch.testing.assert_close(*(torch.autograd.grad(y, rows, g)[0] for y in (layer(x), expected)))
    hidden = torch.randn(2, 3, 32, dtype=torch.float64, requires_grad=True)
    W = table(layer) if tied else head.weight
    expected = hidden @ W.t()
    torch.testing.assert_close(head(hidden), expected)
    if tied:
        g = torch.randn(expected.shape, dtype=torch.float64)
        gradients = [torch.autograd.grad(y, [rows, hidden], g) for y in (head(hidden), expected)]
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("redraw", REDRAW)
@pytest.mark.parametrize("build", [llama, gpt2, bert])
def test_life_of_a_model(build: Any, redraw: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    fresh = get_peft_model(build(), config(redraw=redraw, trainable_token_indices=ROWS))
    layer = embedding(fresh)
    assert torch.equal(layer.lora_rows["default"], layer.get_base_layer().weight[sorted(ROWS)])  # as they were
    model = made(build, redraw)
    plan, y, layer = model.get_plan(), logits(model), embedding(model)
    assert model.get_nb_trainable_parameters()[0] == plan.trainable_parameters
    trained = [n for n, p in layer.named_parameters() if p.requires_grad]
    assert trained == ["lora_rows.default"]
    before = layer.get_base_layer().weight.clone()
    model.merge_adapter()
    index = torch.tensor(sorted(ROWS))
    assert torch.equal(layer.get_base_layer().weight, before.index_copy(0, index, layer.lora_rows["default"].detach()))
    torch.testing.assert_close(logits(model), y)
    model.unmerge_adapter()
    assert torch.equal(layer.get_base_layer().weight, before) and torch.equal(logits(model), y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
    assert abs((tmp_path / "adapter_model.safetensors").stat().st_size - plan.artifact_bytes()) <= 64
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(build(), tmp_path)
    assert torch.equal(logits(again), y)
    assert sorted(again.peft_config["default"].token_indices) == sorted(ROWS)
    low_memory = PeftModel.from_pretrained(again.unload(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(low_memory), y)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), y)


@pytest.mark.parametrize("redraw", ["all", "none"])
def test_an_artifact_alone_is_enough(redraw: str, tmp_path: Path) -> None:
    model = made(llama, redraw)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoLottaLoraModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_it_is_pefts_where_beta_is_one() -> None:
    model = made(lora_alpha=6)
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    theirs = get_peft_model(llama(), LoraConfig(**options, trainable_token_indices=sorted(ROWS))).eval()
    live = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(live[name])
            elif "trainable_tokens_delta" in name:
                parameter.copy_(embedding(model).lora_rows["default"])
        for name, parameter in live.items():
            if "beta" in name:
                parameter.fill_(1)
    torch.testing.assert_close(logits(model), logits(theirs))


def test_training_changes_these_rows_alone() -> None:
    model = made().train()
    layer = embedding(model)
    before, rows = layer.get_base_layer().weight.clone(), layer.lora_rows["default"].detach().clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=torch.tensor([[3, 7]]), labels=torch.tensor([[3, 7]])).loss.backward()
    optimizer.step()
    assert torch.equal(layer.get_base_layer().weight, before)
    assert (layer.lora_rows["default"] != rows).any(1).all()  # all of them through the tied head


def test_rows_of_an_embedding_by_name() -> None:
    model = made(bert, trainable_token_indices={"position_embeddings": [0, 1]})
    assert set(model.get_plan().trained_rows()) == {"bert.embeddings.position_embeddings"}
    y = logits(model)
    with model.disable_adapter():
        assert not torch.equal(logits(model), y)


def test_several_adapters() -> None:
    model = made()
    first = logits(model)
    options: dict[str, Any] = {"redraw": "none", "norms": "frozen", "save_kept": True, "adapter_seed": 3}
    model.add_adapter("b", config(trainable_token_indices=[7], **options))
    assert torch.equal(logits(model), first)
    model.set_adapter("b")
    perturb(model)
    second = logits(model)
    model.base_model.set_adapter(["default", "b"])
    layer = embedding(model)
    x = torch.tensor([3, 7, 8])
    expected = table(layer)[x]
    expected[1] = layer.lora_rows["b"][0]
    assert torch.equal(layer(x), expected)
    model.add_adapter("c", config(trainable_token_indices=[7, 9], **options))
    model.base_model.set_adapter(["b", "c"])
    with pytest.raises(ValueError, match="cannot be active together: they train rows of the same tokens"):
        logits(model)
    model.delete_adapter("c")
    model.set_adapter("b")
    assert torch.equal(logits(model), second) and set(layer.ids.keys()) == {"default", "b"}
    with pytest.raises(ValueError, match="'d' cannot be added: of 'model.embed_tokens' one adapter trains some rows"):
        model.add_adapter("d", config(embeddings="lora", **options))


def test_mixed_rows_of_adapters() -> None:
    model = made(bert, embeddings="frozen", head="lora")
    model.add_adapter("b", config(redraw="none", norms="frozen", save_kept=True, embeddings="frozen", head="lora"))
    x = ids(2)
    mixed = model(x, adapter_names=["default", "__base__"])["logits"]
    torch.testing.assert_close(mixed[0], model(x)["logits"][0])


def test_other_rows_are_not_loaded(tmp_path: Path) -> None:
    made().save_pretrained(tmp_path)
    model = made(trainable_token_indices=[1, 2, 3])
    with pytest.raises(ValueError, match=r"has trained rows \{'model.embed_tokens': \[3, 5, 40\]\}, this model trains"):
        model.load_adapter(tmp_path, "default")


@pytest.mark.parametrize("residency", ["packed", "streamed"])
def test_residency_and_seeds(residency: str) -> None:
    model = made(llama, "all")
    y = logits(model)
    model.set_residency(residency)
    assert torch.equal(logits(model), y)
    with model.scaffold_seed(43):
        assert not torch.equal(logits(model), y)
    assert torch.equal(logits(model), y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = get_peft_model(llama().to(dtype), config(redraw="none", trainable_token_indices=ROWS))
    assert embedding(model).lora_rows["default"].dtype == torch.float32
    assert embedding(model)(ids()).dtype == dtype and logits(model).dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made()(input_ids=ids(), labels=ids()).loss.backward()


@pytest.mark.parametrize(
    ("build", "changes", "message"),
    [
        (llama, {"trainable_token_indices": [99]}, "which has 99 rows, got .99."),
        (bert, {"trainable_token_indices": [0]}, "which has 99 rows of which 0 is padding, got .0."),
        (llama, {"embeddings": "lora"}, "rows of 'model.embed_tokens', which carries an adapter. Drop one"),
        (
            llama,
            {"target_modules": ["embed_tokens", "q_proj"]},
            "rows of 'model.embed_tokens', which carries an adapter",
        ),
        (bert, {"modules_to_save": ["word_embeddings"]}, "which modules_to_save trains as a whole. Drop one"),
        (
            llama,
            {"trainable_token_indices": {"lm_head": [1]}},
            "rows of 'lm_head', a Linear. Rows are trained of an nn.E",
        ),
        (llama, {"trainable_token_indices": {"nope": [1]}}, "names 'nope', but LlamaForCausalLM has no such module"),
        (t5, {}, "in T5ForConditionalGeneration its table is looked up through several modules"),
    ],
)
def test_what_has_no_meaning(build: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(build(), config(**{"trainable_token_indices": [3], **changes}))


def test_a_config_can_be_used_again() -> None:
    settings = config(trainable_token_indices=ROWS)
    counts = {get_peft_model(llama(), settings).get_nb_trainable_parameters() for _ in range(2)}
    assert len(counts) == 1 and settings.to_dict()["trainable_token_indices"] == ROWS


def test_a_plain_module_names_its_embedding() -> None:
    net = nn.ModuleDict({"emb": nn.Embedding(9, 4), "lin": nn.Linear(4, 2)})
    settings = config(target_modules=["lin"], trainable_token_indices={"emb": [1]})
    model = get_peft_model(net, settings)
    assert torch.equal(net["emb"](torch.tensor([1, 2])), net["emb"].get_base_layer().weight[1:3])
    assert model.get_plan().scaffold["emb.weight"].scale == 1.0  # torch's own N(0, 1)
