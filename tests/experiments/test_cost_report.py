from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from tiny import bert, config, ids, llama
from torch import nn

from hf_lottalora import cost_report


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(12, 16, bias=False), nn.Linear(16, 4, bias=False)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(self.hidden(x))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def two() -> tuple[Any, dict[str, torch.Tensor]]:
    model = get_peft_model(Two(), config(r=2, target_modules=["hidden"], modules_to_save=["head"]))
    return model, {"x": torch.randn(8, 12), "labels": torch.zeros(8, dtype=torch.long)}


def test_counts_are_those_by_hand() -> None:
    model, batch = two()
    report = cost_report(model, batch)
    hidden, head, adapter = 12 * 16, 16 * 4, 2 * (12 + 16)
    # Two operations per weight and row: forward; by weight; by input where something before needs it.
    assert report.full_flops_counted == 2 * 8 * (2 * hidden + 3 * head)
    # x needs no gradient, but beta's takes W^T g. A x is computed once more for the gradient of B.
    again = 2 * 12
    assert report.flops_counted == 2 * 8 * (2 * hidden + 3 * head + 2 * adapter + again)
    assert report.full_flops == 6 * 8 * (hidden + head) and report.flops == 8 * (
        4 * (hidden + head) + 2 * (adapter + 1)
    )
    assert report.full_bytes_counted == 16 * (hidden + head)
    assert report.bytes_counted == 2 * hidden + 16 * (head + adapter + 1)


def test_formulas_of_the_paper() -> None:
    model = get_peft_model(llama(), config(task_type="CAUSAL_LM"))
    x = ids(4, 16)
    report = cost_report(model, {"input_ids": x, "labels": x})
    plan = model.get_plan()
    internal = sum(t.survey.numel for t in plan.tensors if "embed_tokens" not in t.path)
    assert report.full_flops == 6 * 64 * internal
    assert report.flops == 64 * (4 * internal + 2 * plan.adapter_parameters)
    assert (report.full_bytes, report.bytes) == (16 * internal, 2 * internal + 14 * plan.adapter_parameters)
    assert report.artifact_bytes == plan.artifact_bytes()
    assert "0.7" in str(report) and "paper's formula" in str(report)


@pytest.mark.parametrize("build", [llama, bert])
def test_counting_leaves_the_model_alone(build: Any) -> None:
    model = get_peft_model(build(), config())
    before = {name: (id(p), p.requires_grad, p.device.type) for name, p in model.named_parameters()}
    labels = ids() if build is llama else torch.zeros(2, dtype=torch.long)
    report = cost_report(model, {"input_ids": ids(), "labels": labels})
    assert report.flops_counted and report.full_flops_counted and report.flops_counted < report.full_flops_counted
    assert before == {name: (id(p), p.requires_grad, p.device.type) for name, p in model.named_parameters()}
    assert all(p.grad is None for p in model.parameters())


def test_without_a_batch_and_without_labels() -> None:
    model = get_peft_model(llama(), config())
    report = cost_report(model)
    assert report.flops is None and report.flops_counted is None and "FLOPs" not in str(report)
    with pytest.raises(ValueError, match="gives no loss; add labels"):
        cost_report(model, {"input_ids": ids()})


def test_gradient_checkpointing_is_not_counted_and_stays_on() -> None:
    x = {"input_ids": ids(), "labels": ids()}
    plain, checkpointed = (get_peft_model(llama(), config()).train() for _ in range(2))
    checkpointed.gradient_checkpointing_enable()
    with torch.no_grad():
        assert cost_report(checkpointed, x) == cost_report(plain, x)
    assert checkpointed.base_model.model.model.layers[0].gradient_checkpointing is True


def test_what_cannot_be_counted() -> None:
    model = get_peft_model(llama(), config())
    with pytest.raises(ValueError, match="The batch has no tensors"):
        cost_report(model, {})
    with pytest.raises(TypeError, match="batch must be a mapping such as .* got Tensor"):
        cost_report(model, torch.zeros(1, 2))  # type: ignore[arg-type]
    model.merge_adapter()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="Adapters are merged, so there is nothing to train"):
        cost_report(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
