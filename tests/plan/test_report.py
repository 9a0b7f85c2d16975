"""A plan as a table in a notebook, and as data."""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from tiny import bert, config, gpt2, llama, mlp, perturb, vit
from torch import nn

from hf_lottalora import LottaLoraConfig, ScaffoldTensor, make_plan

CASES = {
    "llama": (llama, {}),
    "llama, lora": (llama, {"embeddings": "lora"}),
    "bert": (bert, {"biases": "train", "family_pattern": {"query": "binary"}, "use_dora": True, "layer_norm": True}),
    "gpt2, targets": (gpt2, {"redraw": "targets"}),
    "vit, half": (lambda: vit().to(torch.bfloat16), {"embeddings": "frozen", "train_beta": False}),
    "mlp": (mlp, {"target_modules": ["0", "2"], "modules_to_save": ["4"], "residual": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_data_is_complete_and_adds_up(case: str) -> None:
    build, options = CASES[case]
    model = build()
    plan = make_plan(model, config(**options))
    data = json.loads(json.dumps(plan.to_dict(), allow_nan=False))
    assert data == plan.to_dict()  # no tuple, no number of NumPy's

    state = model.state_dict(keep_vars=True)
    assert {path for tensor in data["tensors"] for path in tensor["aliases"]} == set(state)
    for tensor in data["tensors"]:
        live = state[tensor["path"]]
        assert tensor["shape"] == list(live.shape) and f"torch.{tensor['dtype']}" == str(live.dtype)
        assert (tensor["parameters"], tensor["bytes"]) == (live.numel(), live.nbytes)
        assert tensor["path"] in tensor["aliases"]
    assert data["scaffold_parameters"] == sum(t["parameters"] for t in data["tensors"] if t["role"] == "scaffold")
    trained = sum(t["parameters"] for t in data["tensors"] if t["role"] == "trained")
    assert data["trainable_parameters"] == trained + data["adapter_parameters"]
    fixed = 0 if options.get("train_beta", True) else len(data["adapters"])
    assert data["adapter_parameters"] == sum(a["parameters"] for a in data["adapters"]) - fixed
    for adapter in data["adapters"]:
        assert adapter["parameters"] == sum(torch.Size(shape).numel() for shape in adapter["shapes"].values())
    assert data["seed"] == 42 and data["class_name"] == type(model).__name__


@pytest.mark.parametrize("case", CASES)
def test_a_tensor_can_be_drawn_from_what_the_data_say(case: str) -> None:
    build, options = CASES[case]
    plan = make_plan(build(), config(**options))
    for tensor in plan.to_dict()["tensors"]:
        if isinstance(tensor["base"], dict):
            spec = ScaffoldTensor(tensor["name"], tuple(tensor["shape"]), **tensor["base"])
            planned = next(t for t in plan.tensors if t.path == tensor["path"])
            assert spec == planned.base
        else:
            assert tensor["base"] in (None, "constant") and tensor["role"] != "scaffold"


def test_what_is_saved_is_what_the_data_say(tmp_path: Any) -> None:
    model = get_peft_model(llama(), config())
    perturb(model)
    model.save_pretrained(tmp_path)
    data = model.get_plan().to_dict()
    said = {f"{adapter['path']}.{name}" for adapter in data["adapters"] for name in adapter["shapes"]}
    said |= {tensor["path"] for tensor in data["tensors"] if tensor["saved"]}
    file = tmp_path / "adapter_model.safetensors"
    saved = {key.removeprefix("base_model.model.") for key in load_file(file)}
    assert saved == said | {"lottalora_manifest"}
    assert data["artifact_bytes"] == pytest.approx(file.stat().st_size, rel=0.01)
    assert data["digest"] == json.loads(bytes(load_file(file)["lottalora_manifest"].numpy()))["digest"]


def test_every_key_is_documented() -> None:
    plan = make_plan(llama(), config())
    documented = set(re.findall(r"\w+", type(plan).to_dict.__doc__ or ""))
    data = plan.to_dict()
    keys = {*data, *data["tensors"][0], *data["adapters"][0], *data["tensors"][0]["start"]}
    assert keys <= documented


class Table(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.text: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1].append(data)


def test_a_notebook_shows_what_print_shows() -> None:
    plan = make_plan(llama(), config())
    table = Table(plan._repr_html_())
    first, header, *printed, _, _, _ = str(plan).splitlines()
    assert table.rows[0] == header.split()
    assert [re.sub(r"\s+", " ", " ".join(row)) for row in table.rows[1:]] == [
        re.sub(r"\s+", " ", row) for row in printed
    ]
    assert table.text[0] == first
    assert all(line in table.text for line in str(plan).splitlines()[-3:])


def test_names_in_the_table_are_escaped() -> None:
    class Odd(nn.Sequential):
        pass

    Odd.__name__ = "<script>alert(1)</script>"
    net = Odd(OrderedDict({"<b>a&b": nn.Linear(4, 4), "<i>": nn.Linear(4, 2)}))
    plan = make_plan(net, LottaLoraConfig(seed=1, r=1, target_modules=["<b>a&b"], modules_to_save=["<i>"]))
    table = Table(plan._repr_html_())
    assert not table.tags & {"script", "b", "i"}
    assert "LottaLoRA plan for <script>alert(1)</script>, seed 1" in table.text
    assert any("<b>a&b.weight" in row for row in table.rows)
