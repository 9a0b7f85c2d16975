"""What torch's own layers allow with their output and refuse with their input, ours do, with the literal gradients."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from tiny import config, llama
from torch import nn
from transformers import LongformerConfig, LongformerModel, Wav2Vec2Config, Wav2Vec2Model
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.perceiver.modeling_perceiver import Conv2dSamePadding
from transformers.pytorch_utils import Conv1D

from hf_lottalora.layers.conv import ScaffoldConv
from hf_lottalora.residency.forms import VirtualWeight

KINDS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(12, 12),
    "linear without bias": lambda: nn.Linear(12, 12, bias=False),
    "Conv1D": lambda: Conv1D(12, 12),
    "conv1d": lambda: nn.Conv1d(6, 6, 3, padding=1),
    "conv2d": lambda: nn.Conv2d(6, 6, 3, padding=1),
    "conv3d": lambda: nn.Conv3d(6, 6, 3, padding=1, bias=False),
    "conv2d apart": lambda: nn.Conv2d(6, 6, 3, padding=1),
    "forward of its own": lambda: FalconLinear(12, 12),
    "conv, forward of its own": lambda: Conv2dSamePadding(6, 6, 3),
    "embedding": lambda: nn.Embedding(99, 32),
    "tied head": lambda: nn.Linear(32, 99, bias=False),
}
EVERYWHERE: dict[str, dict[str, Any]] = {
    "plain": {},
    "several adapters": {},
    "merged": {},
    "disabled": {},
    "packed": {"residency": "packed"},
    "streamed": {"residency": "streamed"},
    "autocast": {},
}
NOT_EMBEDDINGS: dict[str, dict[str, Any]] = {
    "dropout": {"lora_dropout": 0.5},
    "DoRA": {"use_dora": True},
    "DoRA by input": {"use_dora": True, "dora_magnitude": "inputs"},
    "residual": {"residual": True},
}
VARIANTS = {**EVERYWHERE, **NOT_EMBEDDINGS, "layer_norm": {"layer_norm": True}}


def combinations() -> Iterator[tuple[str, str]]:
    for kind in KINDS:
        table = kind in ("embedding", "tied head")
        variants = EVERYWHERE if table else {**EVERYWHERE, **NOT_EMBEDDINGS} if "conv" in kind else VARIANTS
        refused = ("dropout", "residual") if kind == "conv, forward of its own" else ()
        yield from ((kind, variant) for variant in variants if variant not in refused)


class Case:
    """An adapted layer in float64 (float32 under autocast) with values that no initialisation has, and an input."""

    def __init__(self, kind: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ScaffoldConv, "_one_kernel_is_cheaper", lambda *_: kind != "conv2d apart")
        self.kind, self.variant = kind, variant
        self.dtype = torch.float32 if variant == "autocast" else torch.float64
        options = {"lora_alpha": 6, **VARIANTS[variant]}
        if kind in ("embedding", "tied head"):
            options |= {"embeddings": "lora", "norms": "frozen"}
            self.model = get_peft_model(llama(num_hidden_layers=1), config(**options), autocast_adapter_dtype=False)
            inner: Any = self.model.base_model.model
            self.layer: Any = inner.model.embed_tokens if kind == "embedding" else inner.lm_head
        else:
            options["target_modules"] = ["0"]
            self.model = get_peft_model(nn.Sequential(KINDS[kind]()), config(**options), autocast_adapter_dtype=False)
            self.layer = self.model.base_model.model[0]
        self.source = getattr(self.layer, "embedding", self.layer)  # where the adapter is
        self.adapters = ["default"]
        if variant == "several adapters":
            self.model.add_adapter("other", config(**options))
            self.adapters.append("other")
            self.model.base_model.set_adapter(self.adapters)
        self.model.to(self.dtype)
        self.random = torch.Generator().manual_seed(1)
        for name, parameter in self.model.named_parameters():
            if "lora_" in name:
                parameter.data.copy_(torch.rand(parameter.shape, generator=self.random) + 0.5)
        if variant == "merged":
            self.model.merge_adapter()
        if variant == "disabled":
            self.model.base_model.disable_adapter_layers()
        self.x = self._input()

    def _input(self) -> torch.Tensor:
        if self.kind == "embedding":
            return torch.randint(0, 90, (2, 3), generator=self.random)
        dims = self.layer.base_layer.weight.dim() - 2
        shape = (2, 6, *[5] * dims) if dims else (2, 3, self.layer.base_layer.weight.shape[1])
        return torch.randn(shape, generator=self.random, dtype=torch.float64).to(self.dtype).requires_grad_()

    @property
    def wanted(self) -> list[torch.Tensor]:
        merged = self.variant == "merged"
        found = [p for p in self.source.parameters() if p.requires_grad and not merged]
        return [self.x, *found] if self.x.requires_grad else found

    @contextmanager
    def mode(self) -> Iterator[None]:
        torch.manual_seed(3)  # of the dropout
        with torch.autocast("cpu", torch.bfloat16, enabled=self.variant == "autocast"):
            yield

    def ours(self) -> torch.Tensor:
        with self.mode():
            y: torch.Tensor = self.layer(self.x)
        return y

    def plain(self) -> torch.nn.Module:
        """The layer without adapter, as torch has it: dense and trained."""
        layer = KINDS[self.kind]().to(self.dtype)
        layer.requires_grad_(self.variant not in ("merged", "disabled"))
        return layer

    def literal(self) -> torch.Tensor:
        """The layer with `W + sum((beta - 1) W + (alpha / r) B A)` as its weight, written out in float64."""
        source, base = self.source, self.source.base_layer
        weight = self.original.double()
        adapters = [] if self.variant == "disabled" else self.adapters
        scaffold, products = weight, []
        for name in adapters:
            A, B = (tensor.double().flatten(1) for tensor in source._pair(name))
            product = (B @ A).t() if isinstance(base, (Conv1D, nn.Embedding)) else (B @ A).view(weight.shape)
            products.append(6 / 4 * product)
            scaffold = scaffold + (source.lora_beta[name].value.double() - 1) * weight
        x = self.x if self.kind == "embedding" else self.x.double()
        bias = getattr(base, "bias", None)
        bias = None if bias is None else bias.double()
        if self.variant == "dropout":
            torch.manual_seed(3)
            dropped = source.lora_dropout["default"](x)
            y = self.function(x, scaffold, bias) + self.function(dropped, products[0], None)
        else:
            total = scaffold + sum(products)
            if adapters and "default" in source.lora_magnitude:
                total = total * self.magnitude(total, source.lora_magnitude["default"].value)
            y = self.function(x, total, bias)
        if self.variant == "residual":
            y = y + x
        if self.variant == "layer_norm":
            norms = source.lora_norm_weight["default"].value, source.lora_norm_bias["default"].value
            y = F.layer_norm(y, y.shape[-1:], *norms)
        with self.mode():
            return y.to(self.plain()(self.x.detach()).dtype)

    @property
    def original(self) -> torch.Tensor:
        weight = self.source.original_weight() if self.variant == "merged" else self.source.base_layer.weight
        return weight.dense() if isinstance(weight, VirtualWeight) else weight

    def magnitude(self, total: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
        rows = total.detach().t() if self.kind == "Conv1D" else total.detach()
        if self.variant == "DoRA":
            norms = rows.flatten(1).norm(dim=1)
            factor = (magnitude / norms).view(-1, *(1 for _ in rows.shape[1:]))
        else:
            factor = magnitude / rows.norm(dim=0, keepdim=True)
        return factor.t() if self.kind == "Conv1D" else factor

    def function(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self.kind == "embedding":
            return F.embedding(x, weight)
        if "conv" in self.kind:
            return {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.dim()](x, weight, bias, padding=1)
        return F.linear(x, weight.t() if self.kind == "Conv1D" else weight, bias)


def in_place(y: torch.Tensor) -> torch.Tensor:
    y += 1
    return y


def assigned(y: torch.Tensor) -> torch.Tensor:
    y[0] = 0
    return y


def without_gradient(y: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        y.mul_(2)
    return y


def through(change: Callable[[torch.Tensor], object]) -> Callable[[torch.Tensor], torch.Tensor]:
    def apply(y: torch.Tensor) -> torch.Tensor:
        change(y)
        return y

    return apply


OPERATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "out += 1": in_place,
    "out.mul_": lambda y: y.mul_(2),
    "out.div_ by itself": lambda y: y.mul_(y.detach().sigmoid()),
    "out[0] = 0": assigned,
    "a view, in place": through(lambda y: y.view(-1).mul_(3)),
    "a slice, in place": through(lambda y: y[..., :2].mul_(3)),
    "a transpose, in place": through(lambda y: y.transpose(0, 1).add_(y.detach().transpose(0, 1) ** 2)),
    "requires_grad_": lambda y: y.requires_grad_(),
    "register_hook": through(lambda y: y.register_hook(lambda g: 2 * g) if y.requires_grad else None),
    "retain_grad": through(lambda y: y.retain_grad() if y.requires_grad else None),
    "used twice": lambda y: y + y.square() / 8,
    "used, then in place": lambda y: (y * 2) + y.mul_(3),
    "in place without gradient": without_gradient,
    "relu in place": lambda y: F.relu(y, inplace=True),
    "masked_fill_": lambda y: y.masked_fill_(torch.arange(y.shape[-1]) % 2 == 0, 0.0),
    "squeeze_": lambda y: y.unsqueeze_(0).squeeze_(0),
    "transpose_": lambda y: y.transpose_(0, 1),
}


def gradients(y: torch.Tensor, wanted: list[torch.Tensor]) -> list[torch.Tensor]:
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    found = torch.autograd.grad((y.double() * g).sum(), wanted, allow_unused=True)
    return [torch.zeros_like(one) if grad is None else grad for grad, one in zip(found, wanted, strict=True)]


@pytest.mark.parametrize(("kind", "variant"), combinations())
def test_what_is_done_with_an_output(kind: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(kind, variant, monkeypatch)
    for name, operation in OPERATIONS.items():
        operation(case.plain()(case.x.detach()))  # torch allows it
        y, expected = operation(case.ours()), operation(case.literal())
        assert y.dtype == expected.dtype, name
        results = [
            [one, *(gradients(one, case.wanted) if one.requires_grad and case.wanted else ())] for one in (y, expected)
        ]
        if variant != "autocast":
            torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
        else:
            one, other = (torch.cat([tensor.double().flatten() for tensor in found]) for found in results)
            assert (one - other).norm() <= 0.2 * other.norm(), name  # the sign of one output that is almost zero


def outcome(
    run: Callable[[], torch.Tensor], wanted: list[torch.Tensor], change: Callable[[], object]
) -> list[torch.Tensor] | None:
    """The gradients, where something is changed between forward and backward; None if torch refuses."""
    y = run()
    with torch.no_grad():
        change()
    try:
        return gradients(y, wanted)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        return None


@pytest.mark.parametrize(("kind", "variant"), [c for c in combinations() if c[1] not in ("merged", "disabled")])
def test_what_was_kept_and_is_changed_is_an_error(kind: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(kind, variant, monkeypatch)
    weight = case.source.base_layer.weight
    undisturbed = gradients(case.ours(), case.wanted)

    def change(tensor: torch.Tensor) -> Callable[[], object]:
        if isinstance(tensor, VirtualWeight):
            return lambda: tensor.assign(replace(tensor.scaffold, seed=tensor.scaffold.seed + 1))
        return lambda: tensor.add_(1)

    refused = set()
    for name, tensor in [("x", case.x), *case.source.named_parameters()]:
        before = copy.deepcopy(tensor.detach())
        found = outcome(case.ours, case.wanted, change(tensor))
        if found is None:
            refused.add("weight" if tensor is weight else name)
        else:  # it was not kept, or a copy was
            torch.testing.assert_close(
                found, undisturbed, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}"
            )
        tensor.assign(before.scaffold) if isinstance(tensor, VirtualWeight) else tensor.data.copy_(before)

    layer = case.plain()
    inner = [case.x, layer.weight] if case.x.requires_grad else [layer.weight]

    def plain() -> torch.Tensor:
        with case.mode():
            y: torch.Tensor = layer(case.x)
        return y

    for name, tensor in (("x", case.x), ("weight", layer.weight)):
        if outcome(plain, inner, change(tensor)) is None:
            assert name in refused
    assert "weight" in refused or variant == "autocast"


def test_merging_after_a_forward_pass_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("linear", "plain", monkeypatch)
    assert outcome(case.ours, case.wanted, case.model.merge_adapter) is None
    assert outcome(case.ours, [case.x], case.model.unmerge_adapter) is None


@pytest.mark.parametrize("kind", ["linear", "Conv1D", "tied head"])
def test_frozen_adapters_keep_no_input(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(kind, "plain", monkeypatch)
    case.source.requires_grad_(False)
    expected = gradients(case.literal(), [case.x])
    found = outcome(case.ours, [case.x], lambda: case.x.add_(1))  # as with a frozen nn.Linear
    assert found is not None
    torch.testing.assert_close(found, expected)


def test_a_table_that_is_trained_by_hand_has_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("embedding", "plain", monkeypatch)
    weight = case.layer.base_layer.weight.requires_grad_()
    torch.testing.assert_close(gradients(case.ours(), [weight]), gradients(case.literal(), [weight]))


@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2d apart"])
def test_gradients_are_of_what_functional_call_was_given(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(kind, "plain", monkeypatch)
    other = {"base_layer.weight": 2 * case.layer.base_layer.weight.detach()}
    beta = case.layer.lora_beta["default"].value
    found = gradients(torch.func.functional_call(case.layer, other, (case.x,)), [beta])
    case.layer.base_layer.weight.data.mul_(2)
    torch.testing.assert_close(found, gradients(case.literal(), [beta]))


def wav2vec2() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    convolutions = {"conv_dim": (32,), "conv_kernel": (3,), "conv_stride": (2,), "num_feat_extract_layers": 1}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    model = Wav2Vec2Model(Wav2Vec2Config(**sizes, **convolutions, **positions))
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, 20:] = 0
    return model, {"input_values": torch.randn(2, 40), "attention_mask": mask}


def longformer() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    settings = LongformerConfig(vocab_size=99, **sizes, attention_window=4, max_position_embeddings=64)
    return LongformerModel(settings), {"input_ids": torch.arange(3, 11).expand(2, -1)}


@pytest.mark.parametrize("build", [wav2vec2, longformer])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_architectures_that_write_to_an_output(build: Any) -> None:
    base, batch = build()
    model = get_peft_model(base, config(target_modules="all-linear")).train()
    model(**batch)[0].square().mean().backward()
    adapted = [
        p for name, p in model.named_parameters() if "lora_beta" in name and not re.search("global|pooler", name)
    ]
    assert adapted and all(p.grad is not None for p in adapted)
