"""What a choice by nobody's names leaves out is said, with the reason; where an option decides it, once, aloud."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as T
from peft import get_peft_model
from tiny import config
from torch import nn

from hf_lottalora import Plan, make_plan


class Mixed(nn.Module):
    """A linear layer, convolutions with and without groups, attention, a weight that is read, and one that recurs."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"conv": nn.Conv1d(8, 8, 3, groups=8)}) for _ in range(2)])
        self.plain, self.lin = nn.Conv1d(8, 8, 1), nn.Linear(8, 8)
        self.attention, self.read = nn.MultiheadAttention(8, 2), nn.Linear(8, 8)
        self.lstm, self.up = nn.LSTM(8, 8), nn.ConvTranspose1d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x) @ self.read.weight


def said(plan: Plan) -> dict[str, tuple[str, str]]:
    return {path: (left.reason, left.option) for left in plan.left_out for path in left.paths}


def test_all_linear_says_what_it_does_not_take() -> None:
    plan = make_plan(Mixed(), config(target_modules="all-linear"))
    assert plan.targets == ("lin",)
    named = "all-linear does not take it: name it in target_modules"
    assert said(plan) == {
        "blocks.*.conv": (named, ""),
        "plain": (named, ""),
        "attention": (named, ""),
        "read": ("the weight is read without a call, so that an adapter would do nothing", ""),
        "lstm": ("no adapter goes on LSTM", ""),
        "up": ("no adapter goes on ConvTranspose1d", ""),
    }
    lines = [line for line in str(plan).splitlines() if line.startswith("left out")]
    assert lines[0] == f"left out  blocks.*.conv, plain, attention: {named}" and len(lines) == 4
    assert all(line in plan._repr_html_() for line in lines)
    assert plan.to_dict()["left_out"][0] == {
        "paths": ["blocks.*.conv", "plain", "attention"],
        "reason": named,
        "option": "",
    }


def test_nothing_is_said_of_layers_that_were_named_or_excluded_or_are_trained_whole() -> None:
    everything = ["conv", "plain", "attention", "read", "lstm", "up"]
    for options in ({"exclude_modules": everything}, {"modules_to_save": everything}):
        assert make_plan(Mixed(), config(target_modules="all-linear", **options)).left_out == ()
    assert make_plan(Mixed(), config(target_modules=["lin"])).left_out == ()


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.both = nn.Linear(8, 8), nn.MultiheadAttention(8, 2)


class Network(T.PreTrainedModel):
    """With attention that is a class of its own and torch's, or without any."""

    config_class = T.PretrainedConfig

    def __init__(self, settings: Any, attends: bool = True) -> None:
        super().__init__(settings)
        convolutions = (nn.ModuleDict({"deep": nn.Conv1d(8, 8, 3, groups=8)}) for _ in range(2))
        self.blocks, self.plain, self.lin = nn.ModuleList(convolutions), nn.Conv1d(8, 8, 1), nn.Linear(8, 8)
        self.attention = SelfAttention() if attends else nn.Identity()
        self.post_init()


def network(attends: bool = True) -> Network:
    return Network(T.PretrainedConfig(initializer_range=0.02), attends)


GROUPS = "the rank is no multiple of the convolution's groups"
DROPOUT = "lora_dropout and dora_magnitude='inputs' do not go together on convolutions"
DECIDED = [
    (False, {"r": 4}, ["blocks.*.deep"], GROUPS, "r=4"),
    (False, {"r": 8, "rank_pattern": {"deep": 2}}, ["blocks.*.deep"], GROUPS, "rank_pattern"),
    (False, {"r": 8, "layer_norm": True}, ["blocks.*.deep", "plain"], "layer_norm is not supported on convolutions", "layer_norm=True"),
    (
        False,
        {"r": 8, "use_dora": True, "dora_magnitude": "inputs", "lora_dropout": 0.1},
        ["blocks.*.deep", "plain"],
        DROPOUT,
        "lora_dropout=0.1 with dora_magnitude='inputs'",
    ),
    (True, {"lora_dropout": 0.1}, ["attention.both"], "lora_dropout is not supported on nn.MultiheadAttention", "lora_dropout=0.1"),
    (True, {"layer_norm": True}, ["attention.both"], "layer_norm is not supported on nn.MultiheadAttention", "layer_norm=True"),
]  # fmt: skip


@pytest.mark.parametrize(("attends", "options", "paths", "reason", "option"), DECIDED)
def test_an_option_that_leaves_layers_out_is_named_once(
    attends: bool, options: dict[str, Any], paths: list[str], reason: str, option: str
) -> None:
    with pytest.warns(UserWarning) as caught:
        model = get_peft_model(network(attends), config(**options))
    (message,) = (str(w.message) for w in caught if w.category is not FutureWarning)
    assert message.startswith(f"{option} leaves out {', '.join(paths)}: {reason}. ")
    assert [tuple(left) for left in model.get_plan().left_out] == [(tuple(paths), reason, option)]
    assert f"left out  {', '.join(paths)}: {reason} ({option})" in str(model.get_plan()).splitlines()
    with model.scaffold_seed(7):  # plans again; warnings are errors
        assert model.get_plan().left_out
    options = {name: value for name, value in options.items() if name != "rank_pattern"}  # would match nothing else
    names = [path.rpartition(".")[2] for path in paths]
    assert make_plan(network(attends), config(**options, exclude_modules=names)).left_out == ()


def test_nothing_is_left_out_where_everything_fits() -> None:
    plan = make_plan(network(False), config(r=8))
    assert plan.targets == ("blocks.0.deep", "blocks.1.deep", "lin", "plain") and plan.left_out == ()
    assert make_plan(network(), config()).targets == ("attention.both", "attention.query")


def test_the_rule_says_whether_something_attends() -> None:
    after = "so all linear layers and convolutions outside embeddings"
    assert make_plan(network(False), config(r=8)).rule == f"by structure: nothing attends, {after}"
    model = network()
    del model.attention.query
    with pytest.warns(UserWarning, match="lora_dropout=0.1 leaves out attention.both"):
        plan = make_plan(model, config(r=8, lora_dropout=0.1))
    assert plan.rule == f"by structure: what attends offers no layer to adapt, {after}"
    assert plan.targets == ("blocks.0.deep", "blocks.1.deep", "lin", "plain")
    xlnet = T.XLNetModel(T.XLNetConfig(vocab_size=99, d_model=32, n_layer=1, n_head=4, d_inner=48))
    assert make_plan(xlnet, config()).rule == f"by structure: what attends offers no layer to adapt, {after}"


def test_a_recorded_choice_leaves_nothing_out() -> None:
    paths = make_plan(network(False), config(r=8)).targets
    plan = make_plan(network(False), config(r=8, resolved_targets=list(paths)))
    assert (plan.targets, plan.left_out) == (paths, ())
