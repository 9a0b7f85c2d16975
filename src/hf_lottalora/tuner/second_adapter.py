"""What a further adapter shares with the first one over the same base model."""

from __future__ import annotations

import torch

from ..config import LottaLoraConfig
from ..plan.plan import Plan, PlannedTensor
from ..scaffold.tensor import ScaffoldTensor


def check_second_adapter(
    adapter_name: str, plan: Plan, config: LottaLoraConfig, first_plan: Plan, first_config: LottaLoraConfig
) -> None:
    """Refuse an adapter over another base model than the one that the first adapter has made.

    Raises:
        ValueError: an option that shapes the base model differs, a tensor would be something else without adapters,
            or the model has running statistics, of which there is only one copy.
    """
    for option in ("seed", "family", "scale", "redraw", "save_kept"):
        if getattr(first_config, option) != getattr(config, option):
            raise ValueError(
                f"Adapter {adapter_name!r} has {option}={getattr(config, option)!r}, but this model's scaffold was "
                f"made with {option}={getattr(first_config, option)!r} by its first adapter. Adapters share "
                "one scaffold: use the same value, or build a second model."
            )
    for mine, first in zip(plan.tensors, first_plan.tensors, strict=True):
        if not _same_base(mine.base, first.base):
            raise ValueError(
                f"Adapter {adapter_name!r} needs {mine.path!r} as {_described(mine)}, but this model's first "
                f"adapter made it {_described(first)}. Adapters share one base model: use the same target_modules, "
                "modules_to_save, head and embeddings, or build a second model."
            )
    if any(t.survey.kind == "buffer" and t.path.endswith(("running_mean", "running_var")) for t in plan.tensors):
        raise ValueError(
            f"Adapter {adapter_name!r} cannot be added: the model has running statistics (BatchNorm), of which "
            "there is one copy, and every adapter trains its own. Build a second model."
        )


def _same_base(one: ScaffoldTensor | torch.Tensor | None, other: ScaffoldTensor | torch.Tensor | None) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and one == other


def _described(tensor: PlannedTensor) -> str:
    if isinstance(tensor.base, ScaffoldTensor):
        return f"drawn ({tensor.base.family}, scale {tensor.base.scale:.4g})"
    return "it was" if tensor.base is None else "the architecture's constant"
