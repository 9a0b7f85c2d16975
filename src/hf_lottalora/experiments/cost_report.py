"""What training costs (paper section 5): the paper's formulas, and beside them what is counted on the model.

N are the backbone's parameters without embeddings and head, N_tr those of A, B and beta, M the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ..layers.layer import ScaffoldLayer
from ..plan.plan import Plan
from ..tuner.model import tuner_of

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class CostReport:
    """Costs of full training and of LottaLoRA. `print(report)` shows them side by side.

    Attributes:
        full_flops, flops: of one training step, by the paper: 6 M N, and M (4 N + 2 N_tr).
        full_flops_counted, flops_counted: of matrix products and convolutions in one step of this model, None without a
            batch. Unlike the formulas they include attention scores, head, and embeddings that multiply.
        full_bytes, bytes: parameters and optimiser in mixed precision, by the paper: 16 N, and 2 N + 14 N_tr.
        full_bytes_counted, bytes_counted: the same per parameter that is there (frozen 2 bytes, trained 16), heads and
            embeddings included.
        checkpoint_bytes: all parameters of the base model in its dtype.
        artifact_bytes: `adapter_model.safetensors`, to within a few bytes.
    """

    full_flops: float | None
    flops: float | None
    full_flops_counted: int | None
    flops_counted: int | None
    full_bytes: int
    bytes: int
    full_bytes_counted: int
    bytes_counted: int
    checkpoint_bytes: int
    artifact_bytes: int

    def __str__(self) -> str:
        rows: list[tuple[str, float | None, float | None]] = [
            ("training FLOPs per step, paper's formula", self.full_flops, self.flops),
            ("training FLOPs per step, counted", self.full_flops_counted, self.flops_counted),
            ("parameters + optimiser, bytes, paper's formula", self.full_bytes, self.bytes),
            ("parameters + optimiser, bytes, counted", self.full_bytes_counted, self.bytes_counted),
            ("saved, bytes", self.checkpoint_bytes, self.artifact_bytes),
        ]
        lines = [f"{'':<46} {'full training':>20} {'LottaLoRA':>20} {'ratio':>6}"]
        for label, full, ours in rows:
            if full is not None and ours is not None:
                lines.append(f"{label:<46} {full:>20,.0f} {ours:>20,.0f} {ours / full:>6.3f}")
        return "\n".join(lines)


def cost_report(model: PeftModel, batch: Mapping[str, Any] | None = None) -> CostReport:
    """Costs of one adapter's training, the first active one's.

    Args:
        model: with a LottaLoRA adapter.
        batch: arguments of one forward pass that returns a loss, `input_ids` and `labels` say. FLOPs are counted by
            running it on fake tensors, forward and backward: no weight is read and nothing is allocated. The paper's M
            is the number of elements of `input_ids`, else the rows of the first tensor. torch's counter takes no
            account of groups in the gradient of a convolution's kernel.

    Raises:
        TypeError: the batch is not a mapping, or has an argument that the forward pass does not take.
        ValueError: the model has no LottaLoRA adapter or is merged, the batch has no tensors or gives no loss, or the
            architecture computes something that fake tensors cannot (then leave out the batch).

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from hf_lottalora import LottaLoraConfig
        >>> net = torch.nn.Sequential(torch.nn.Linear(100, 100), torch.nn.ReLU(), torch.nn.Linear(100, 100))
        >>> model = get_peft_model(net, LottaLoraConfig(seed=42, r=1, target_modules=["0", "2"]))
        >>> cost_report(model).full_bytes
        323200
    """
    tuner = tuner_of(model)
    if any(isinstance(module, ScaffoldLayer) and module.merged for module in tuner.model.modules()):
        raise ValueError("Adapters are merged, so there is nothing to train. Call unmerge_adapter() first.")
    if batch is not None and not isinstance(batch, Mapping):
        raise TypeError(
            f"batch must be a mapping such as {{'input_ids': ..., 'labels': ...}}, got {type(batch).__name__}."
        )
    if batch is not None and not any(isinstance(value, torch.Tensor) for value in batch.values()):
        raise ValueError(f"The batch has no tensors: {dict(batch)!r}.")
    report = plan_costs(tuner.get_plan(), None if batch is None else _tokens(batch))
    if batch is None:
        return report
    full, ours = (_counted(model, batch, full) for full in (True, False))
    return replace(report, full_flops_counted=full, flops_counted=ours)


def plan_costs(plan: Plan, tokens: int | None) -> CostReport:
    """Costs that a plan says, for steps of so many tokens; without what only a forward pass can count."""
    tensors = [tensor for tensor in plan.tensors if tensor.survey.kind != "buffer"]
    everything = sum(tensor.survey.numel for tensor in tensors)
    internal = sum(
        tensor.survey.numel
        for tensor in tensors
        if tensor.survey.kind != "embedding" and not tensor.survey.in_head and not tensor.survey.tied_head
    )
    adapters, trained = plan.adapter_parameters, plan.trainable_parameters
    return CostReport(
        full_flops=None if tokens is None else 6.0 * tokens * internal,
        flops=None if tokens is None else tokens * (4.0 * internal + 2.0 * adapters),
        full_flops_counted=None,
        flops_counted=None,
        full_bytes=16 * internal,
        bytes=2 * internal + 14 * adapters,
        full_bytes_counted=16 * everything,
        bytes_counted=2 * (plan.total_parameters - trained) + 16 * trained,
        checkpoint_bytes=sum(tensor.survey.numel * tensor.survey.dtype.itemsize for tensor in tensors),
        artifact_bytes=plan.artifact_bytes(),
    )


def _tokens(batch: Mapping[str, Any]) -> int:
    ids = batch.get("input_ids")
    if isinstance(ids, torch.Tensor):
        return ids.numel()
    first = next(value for value in batch.values() if isinstance(value, torch.Tensor))
    return math.prod(first.shape[:1])


@contextmanager
def _bypassed(base: torch.nn.Module, adapters: bool) -> Iterator[None]:
    """Without gradient checkpointing, which counts twice, and on request without adapters; nothing else changes."""
    changes: list[tuple[torch.nn.Module, str]] = [
        (module, "gradient_checkpointing") for module in base.modules() if hasattr(module, "gradient_checkpointing")
    ]
    before = [getattr(module, name) for module, name in changes]
    layers = [module for module in base.modules() if adapters and isinstance(module, BaseTunerLayer)]
    disabled = [layer._disable_adapters for layer in layers]
    try:
        for module, name in changes:
            setattr(module, name, False)
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for (module, name), value in zip(changes, before, strict=True):
            setattr(module, name, value)
        for layer, value in zip(layers, disabled, strict=True):
            layer._disable_adapters = value


def _counted(model: PeftModel, batch: Mapping[str, Any], full: bool) -> int:
    base: torch.nn.Module = model.get_base_model()
    fake = FakeTensorMode()
    named = dict(base.named_parameters(remove_duplicate=False))
    twins: dict[int, torch.Tensor] = {}
    state: dict[str, torch.Tensor] = {}
    for name, parameter in named.items():
        wanted = ("lora_" not in name) if full else parameter.requires_grad
        if id(parameter) not in twins:
            with fake:  # made anew: a weight that is not in memory cannot be copied
                twin = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
            twins[id(parameter)] = twin.requires_grad_(wanted)
        state[name] = twins[id(parameter)]
    state.update({name: fake.from_tensor(buffer) for name, buffer in base.named_buffers()})
    inputs = {k: fake.from_tensor(value) if isinstance(value, torch.Tensor) else value for k, value in batch.items()}
    counter = FlopCounterMode(display=False)
    with fake, counter, torch.enable_grad(), _bypassed(base, full):
        try:
            output = torch.func.functional_call(base, state, kwargs=inputs, tie_weights=False)
        except (RuntimeError, NotImplementedError, AssertionError) as error:
            raise ValueError(
                f"The FLOPs of {type(base).__name__} cannot be counted: a forward pass on fake tensors failed "
                f"({error}). Without a batch, the rest of the report can be had."
            ) from error
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if loss is None:
            raise ValueError("The batch gives no loss; add labels to it.")
        loss.backward()
    return counter.get_total_flops()
