"""Bases whose weights something else holds: offloaded by Accelerate, or in a tensor class of their own, as torchao's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.quantization_utils import QuantizationBackend
from tiny import config, ids, llama, logits, perturb
from torch import nn

KEPT = {"redraw": "none", "embeddings": "frozen", "norms": "frozen"}


class Quantised(torch.Tensor):
    """Eight bits a weight and a scale per row. Multiplies and dequantises; nothing else, not even `view`."""

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor) -> Quantised:
        made: Quantised = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)
        made.codes, made.scale = codes, scale
        return made

    def dequantize(self) -> torch.Tensor:
        return self.codes * self.scale

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.dequantize().to(x.dtype), *bias)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten.detach:
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(f"{func} of a Quantised")


def quantise(module: nn.Module) -> None:
    weight = module.weight.detach()
    scale = weight.abs().amax(1, keepdim=True) / 127
    module.weight = nn.Parameter(Quantised((weight / scale).round().to(torch.int8), scale), requires_grad=False)


def quantised(also: str | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = llama(tie_word_embeddings=False)
    for name, module in model.named_modules():
        if (isinstance(module, nn.Linear) and name != "lm_head") or name == also:
            quantise(module)
    return model


def dequantised() -> nn.Module:
    model = quantised()
    for module in model.modules():
        if isinstance(getattr(module, "weight", None), Quantised):
            module.weight = nn.Parameter(module.weight.dequantize())
    return model


def in_memory() -> nn.Module:
    torch.manual_seed(0)
    return llama()


def on_cpu(folder: Path) -> nn.Module:
    return cpu_offload(in_memory(), execution_device="cpu", offload_buffers=True)


def on_disk(folder: Path) -> nn.Module:
    return disk_offload(in_memory(), str(folder / "disk"), execution_device="cpu")


def partly_on_disk(folder: Path) -> nn.Module:
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    return dispatch_model(in_memory(), places, main_device="cpu", offload_dir=str(folder / "disk"), force_hooks=True)


OFFLOADED = [on_cpu, on_disk, partly_on_disk]
Build = Callable[[Path], nn.Module]


def loss_and_gradients(model: nn.Module) -> list[torch.Tensor]:
    model.zero_grad()
    loss = model.train()(input_ids=ids(), labels=ids()).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


OPTIONS: dict[str, dict[str, Any]] = {
    "attention": {},
    "everything": {"target_modules": "all-linear"},
    "dora": {"use_dora": True},
    "embedding and tied head": {"embeddings": "lora"},
    "one layer": {"layers_to_transform": [0]},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("build", OFFLOADED)
def test_offloaded_bases_compute_what_they_do_in_memory(build: Build, options: dict[str, Any], tmp_path: Path) -> None:
    models = []
    for base in (in_memory(), build(tmp_path)):
        model = get_peft_model(base, config(**{**KEPT, **options}))
        perturb(model)
        models.append(model)
    expected, found = (loss_and_gradients(model) for model in models)
    assert len(expected) == len(found) > 1
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    memory, offloaded = models
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    assert offloaded.get_plan().kept_digests == memory.get_plan().kept_digests
    assert torch.equal(logits(offloaded), logits(memory))
    with offloaded.disable_adapter(), memory.disable_adapter():
        assert torch.equal(logits(offloaded), logits(memory))


@pytest.mark.parametrize("build", OFFLOADED)
def test_the_life_of_an_adapter_over_an_offloaded_base(build: Build, tmp_path: Path) -> None:
    memory = get_peft_model(in_memory(), config(**KEPT))
    perturb(memory)
    memory.save_pretrained(tmp_path / "adapter")
    expected = logits(memory)
    assert torch.equal(logits(PeftModel.from_pretrained(build(tmp_path), tmp_path / "adapter")), expected)
    model = get_peft_model(build(tmp_path), config(**KEPT))
    set_peft_model_state_dict(model, get_peft_model_state_dict(memory))
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(PeftModel.from_pretrained(in_memory(), tmp_path / "again")), expected)
    model.add_adapter("other", config(**KEPT, adapter_seed=3))
    model.set_adapter("other")
    perturb(model)
    assert not torch.equal(logits(model), expected)
    model.set_adapter("default")
    assert torch.equal(logits(model), expected)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)


def test_what_is_in_memory_can_be_drawn_and_trained(tmp_path: Path) -> None:
    options = {"redraw": "targets", "norms": "frozen", "target_modules": r"model\.layers\.0\..*_proj"}
    models = [get_peft_model(base, config(**options)) for base in (in_memory(), partly_on_disk(tmp_path))]
    for model in models:
        perturb(model)
        model.verify_scaffold(full=True)
    assert all(torch.equal(a, b) for a, b in zip(*map(loss_and_gradients, models), strict=True))


def test_the_survey_copies_nothing_that_is_offloaded(tmp_path: Path) -> None:
    class Weights(dict[str, torch.Tensor]):
        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError("copied")

    base = cpu_offload(in_memory(), execution_device="cpu")
    for module in base.modules():
        hook = getattr(module, "_hf_hook", None)
        if getattr(hook, "weights_map", None) is not None:
            hook.weights_map = Weights(
                {name: hook.weights_map[name] for name, p in module._parameters.items() if p is not None}
            )
    logits(get_peft_model(base, config(**KEPT)))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "drawn over": (
        {"redraw": "all", "embeddings": "frozen"},
        "cannot be drawn over. Load the model in memory without quantisation, or pass redraw='none'",
    ),
    "drawn over, targets": ({"redraw": "targets", "embeddings": "frozen", "norms": "frozen"}, "cannot be drawn over"),
    "saved": (
        {**KEPT, "save_kept": True},
        "cannot be saved. Load the model in memory without quantisation, or leave save_kept=False",
    ),
}


def refused(base: nn.Module, options: dict[str, Any], message: str) -> None:
    state = [(name, id(p)) for name, p in base.named_parameters()]
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, config(**options))
    assert [(name, id(p)) for name, p in base.named_parameters()] == state


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("build", OFFLOADED)
def test_drawing_over_an_offloaded_base_is_refused(build: Build, name: str, tmp_path: Path) -> None:
    options, message = REFUSED[name]
    refused(build(tmp_path), options, f"is offloaded by Accelerate, and {message}")


@pytest.mark.parametrize("build", OFFLOADED)
def test_training_what_is_offloaded_is_refused(build: Build, tmp_path: Path) -> None:
    message = "is offloaded by Accelerate, and cannot be trained. Load the model in memory without quantisation, or freeze it: embed"
    refused(build(tmp_path), {"redraw": "none"}, message)


@pytest.mark.parametrize("name", REFUSED)
def test_drawing_over_a_quantised_base_is_refused(name: str) -> None:
    options, message = REFUSED[name]
    refused(quantised(), options, f"'model.layers.0.self_attn.q_proj.weight' is a Quantised, and {message}")


def test_training_what_is_quantised_is_refused() -> None:
    refused(quantised("lm_head"), {"redraw": "none"}, "'lm_head.weight' is a Quantised, and cannot be trained")


@pytest.mark.parametrize(
    "options", [{}, {"embeddings": "frozen"}, {"target_modules": "all-linear"}, {"use_dora": True}, {"residual": True}]
)
def test_quantised_bases_compute_what_their_values_do(options: dict[str, Any], tmp_path: Path) -> None:
    models = []
    for base in (dequantised(), quantised()):
        start = logits(base)
        model = get_peft_model(base, config(**{"redraw": "none", **options}))
        if not options.keys() & {"residual", "use_dora"}:
            assert torch.equal(logits(model), start)
        perturb(model)
        models.append(model)
    expected, found = (loss_and_gradients(model) for model in models)
    assert len(expected) == len(found) > 1
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    dense, model = models
    assert sum(isinstance(p, Quantised) for p in model.parameters()) == 14
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert logits(model).isfinite().all()
    model.save_pretrained(tmp_path)
    for base in (quantised(), dequantised()):  # the same values are the same base
        assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path)), logits(dense))
    other = quantised()
    other.model.layers[0].mlp.up_proj.weight.scale.mul_(2)
    with pytest.raises(ValueError, match="up_proj"):
        PeftModel.from_pretrained(other, tmp_path)


class Requantised(QuantizationBackend):
    """As PEFT's for torchao, which it makes for a model that transformers has quantised."""

    supports_merge, backend_name, layer_type = True, "test", "linear"

    def get_base_weight(self, base_layer: nn.Module) -> torch.Tensor:
        return base_layer.weight.dequantize()

    def set_base_weight(self, peft_layer: Any, weight_data: torch.Tensor) -> None:
        peft_layer.get_base_layer().weight = weight_data
        quantise(peft_layer.get_base_layer())


def test_merging_into_a_quantised_base() -> None:
    model = get_peft_model(quantised(), config(redraw="none"))
    perturb(model)
    expected = logits(model)
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="The base weight is a Quantised, and nothing says how to quantise"):
            call()
        assert torch.equal(logits(model), expected)
    for module in model.modules():
        if hasattr(module, "lora_beta"):
            module.quantization_backend = Requantised()
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=0.05, atol=0.05)
    assert not torch.equal(logits(model), expected)
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)
    merged = model.merge_and_unload()
    assert isinstance(merged.model.layers[0].self_attn.q_proj.weight, Quantised)
    torch.testing.assert_close(logits(merged), expected, rtol=0.05, atol=0.05)
