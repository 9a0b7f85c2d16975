"""`torch.compile` and `torch.func` over adapted models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import bert, config, ids, llama, mlp, perturb
from torch import nn
from torch.func import functional_call, grad, vmap

from hf_lottalora.layers.conv import ScaffoldConv

Parameters = dict[str, torch.Tensor]
PLAIN = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (llama, {}),
    "llama, embeddings adapted": (llama, {"embeddings": "lora"}),
    "llama, DoRA": (llama, {"use_dora": True, "dora_magnitude": "inputs"}),
    "llama, dropout": (llama, {"lora_dropout": 0.5}),
    "bert": (lambda: bert(**PLAIN), {"target_modules": "all-linear"}),
}


LONG = {"llama, embeddings adapted", "llama, dropout", "bert"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.smoke] * (name in LONG)) for name in MODELS])
@pytest.mark.parametrize("backend", [pytest.param("eager", marks=pytest.mark.smoke), "aot_eager"])  # which contains it
def test_compiled_without_a_graph_break(name: str, backend: str) -> None:
    build, options = MODELS[name]
    model = get_peft_model(build(), config(**options)).eval()
    perturb(model)
    torch._dynamo.reset()
    results = []
    for call in (model, torch.compile(model, fullgraph=True, backend=backend)):
        model.zero_grad()
        logits = call(input_ids=ids()).logits
        logits.square().mean().backward()
        results.append([logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def networks() -> dict[str, tuple[PeftModel, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    dense = get_peft_model(mlp(), config(target_modules=["0", "2"]))
    convolution = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 3))
    adapted = get_peft_model(convolution, config(target_modules=["0"], modules_to_save=["2"]))
    return {
        "mlp": (dense, torch.randn(5, 12, generator=generator)),
        "convolution": (adapted, torch.randn(5, 3, 6, 6, generator=generator)),
    }


@pytest.mark.parametrize("name", ["mlp", "convolution"])
@pytest.mark.parametrize("one_kernel", [True, False])
def test_torch_func(name: str, one_kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ScaffoldConv, "_one_kernel_is_cheaper", lambda *_: one_kernel)
    model, x = networks()[name]
    perturb(model)
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters: Parameters, x: torch.Tensor) -> torch.Tensor:
        return functional_call(model, parameters, (x,)).square().sum()

    model(x).square().sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    torch.testing.assert_close(grad(loss)(parameters, x), expected)
    # Gradients of each example.
    each = vmap(grad(lambda parameters, row: loss(parameters, row[None])), (None, 0))(parameters, x)
    torch.testing.assert_close({name: one.sum(0) for name, one in each.items()}, expected, rtol=1e-4, atol=1e-4)
    # An ensemble of adapters over one scaffold.
    doubled = {name: 2 * p for name, p in parameters.items()}
    both = {name: torch.stack([p, doubled[name]]) for name, p in parameters.items()}
    outputs = vmap(lambda parameters: functional_call(model, parameters, (x,)))(both)
    torch.testing.assert_close(outputs[1], functional_call(model, doubled, (x,)), rtol=1e-4, atol=1e-4)
    gradients = vmap(grad(loss), (0, None))(both, x)
    for name, expected_gradient in grad(loss)(doubled, x).items():
        torch.testing.assert_close(gradients[name][1], expected_gradient, rtol=1e-3, atol=1e-3)
