"""Weights that a forward pass writes into: trained whole, or refused by name before anything has changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import config
from torch import nn


class Net(nn.Module):
    def __init__(self, table: type[nn.Module] = nn.Embedding) -> None:
        super().__init__()
        self.emb, self.lin, self.head = table(20, 8, max_norm=0.5), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.lin(self.emb(x)))
        return result


X = torch.arange(10).view(2, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["lin", "emb"]}, "matches 'emb', a Embedding, whose forward writes into its table"),
        ({"trainable_token_indices": {"emb": [3]}}, "rows of 'emb', a Embedding, whose forward writes into its table"),
        ({"embeddings": "frozen"}, "'emb.weight' is a weight under max_norm.* cannot be drawn: it would not stay what"),
        ({"embeddings": "frozen", "redraw": "none"}, "'emb.weight' is a .* cannot be kept out of the artifact.* Train"),
        ({"embeddings": "frozen", "redraw": "targets"}, "'emb.weight' is a .* cannot be kept out of the artifact"),
    ],
)
def test_refused_before_anything_changes(options: dict[str, Any], message: str) -> None:
    net = Net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        get_peft_model(net, config(**{"target_modules": ["lin"], "modules_to_save": ["head"], "scale": 0.1, **options}))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert type(net.emb) is nn.Embedding and type(net.lin) is nn.Linear


def test_a_bag_is_drawn_no_more_than_an_embedding() -> None:
    settings: dict[str, Any] = {"target_modules": ["lin"], "scale": 0.1}
    with pytest.raises(ValueError, match="'emb.weight' is a weight under max_norm"):
        get_peft_model(Net(nn.EmbeddingBag), config(modules_to_save=["head"], **settings))
    get_peft_model(Net(nn.EmbeddingBag), config(modules_to_save=["head", "emb"], **settings))(X)


@pytest.mark.parametrize(
    "options", [{}, {"redraw": "none"}, {"redraw": "none", "embeddings": "frozen", "save_kept": True}]
)
def test_trained_whole_or_saved_it_works(options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    start = Net().state_dict()

    def net() -> Net:
        made = Net()
        made.load_state_dict(start)
        return made

    model = get_peft_model(net(), config(target_modules=["lin"], modules_to_save=["head"], **options))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
    expected = model(X)
    with model.disable_adapter():
        model(X)
    assert torch.equal(model(X), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(net(), tmp_path)(X), expected)
