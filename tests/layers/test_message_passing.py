"""Graph networks: message passing whose layers are linear, against the literal equation."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from tiny import config, perturb
from torch import nn


class GIN(nn.Module):
    """h <- MLP((1 + eps) h + sum of the neighbours' h), then a linear read-out of the mean node (Xu et al., 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(inputs, 8), nn.ReLU(), nn.Linear(8, 8)) for inputs in (5, 8, 8)
        )
        self.eps = nn.Parameter(torch.zeros(3))
        self.readout = nn.Linear(8, 2)

    def forward(self, nodes: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        for eps, layer in zip(self.eps, self.layers, strict=True):
            source, target = edges
            nodes = layer((1 + eps) * nodes + torch.zeros_like(nodes).index_add(0, target, nodes[source]))
        return self.readout(nodes.mean(0))


LINEAR = [f"layers.{layer}.{index}" for layer in range(3) for index in (0, 2)]
EDGES = torch.tensor([[0, 1, 1, 2, 3, 0], [1, 0, 2, 1, 0, 3]])


def adapted() -> PeftModel:
    model = get_peft_model(
        GIN().double(), config(target_modules=LINEAR, modules_to_save=["readout"]), autocast_adapter_dtype=False
    )
    perturb(model)
    return model.double()


def literal(model: PeftModel, nodes: torch.Tensor) -> torch.Tensor:
    """The same network with a dense adjacency matrix and with `beta W + (alpha / r) B A` written out."""
    network = model.base_model.model
    adjacency = torch.zeros(4, 4, dtype=torch.float64).index_put((EDGES[1], EDGES[0]), torch.ones(6).double())
    for eps, layer in zip(network.eps, network.layers, strict=True):
        nodes = (1 + eps) * nodes + adjacency @ nodes
        for linear in (layer[0], layer[2]):
            A, B = linear.lora_A["default"].weight, linear.lora_B["default"].weight
            weight = linear.lora_beta["default"].value * linear.base_layer.weight + linear.scaling["default"] * B @ A
            nodes = nodes @ weight.t() + linear.base_layer.bias
            nodes = nodes.relu() if linear is layer[0] else nodes
    return network.readout(nodes.mean(0))


def test_equals_the_literal_equation_merged_or_not() -> None:
    model, nodes = adapted(), torch.randn(4, 5, dtype=torch.float64)
    expected = literal(model, nodes)
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.testing.assert_close(model(nodes, EDGES), expected, rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(y.sum(), wanted) for y in (model(nodes, EDGES), expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    before = model(nodes, EDGES)
    model.merge_adapter()
    torch.testing.assert_close(model(nodes, EDGES), expected, rtol=1e-10, atol=1e-10)
    model.unmerge_adapter()
    assert torch.equal(model(nodes, EDGES), before)


def test_saved_and_loaded(tmp_path: Path) -> None:
    model, nodes = adapted(), torch.randn(4, 5, dtype=torch.float64)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(GIN().double(), tmp_path, autocast_adapter_dtype=False)
    assert torch.equal(again(nodes, EDGES), model(nodes, EDGES))
