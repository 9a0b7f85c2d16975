"""Every rank draws its own scaffold, or its shard of it; this makes sure that they drew the same one."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch.distributed as dist
from peft import PeftModel
from transformers import TrainerCallback

from ..scaffold.tensor import combined_digest


def check_ranks_agree(model: PeftModel) -> None:
    """Compare one combined digest over all ranks. A collective: every rank must call it. Alone it does nothing.

    What a rank has in memory, of sharded weights its own shards, is compared with what its seed draws.

    Raises:
        RuntimeError: a rank has another scaffold; the message names the ranks, and the first tensor that differs.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    plan = model.base_model.get_plan()
    mine = {"hf_lottalora": version("hf-lottalora"), "scaffold": combined_digest(plan.seed, plan.scaffold_digests())}
    mine["dtypes"] = ", ".join(sorted({str(t.survey.dtype) for t in plan.with_role("scaffold")}))
    try:
        model.base_model.verify_scaffold()
    except ValueError as error:  # raised on every rank below: one that raised alone would leave the others waiting
        mine["weights"] = str(error)
    found = _of_all_ranks(mine)
    others = [rank for rank, its in enumerate(found) if its != found[0]]
    if not others:
        if "weights" in mine:
            raise RuntimeError(f"On every rank: {mine['weights']}")
        return
    digests = _of_all_ranks(plan.scaffold_digests())
    first = digests[0]
    names = sorted({name for its in digests for name in its.keys() | first.keys() if its.get(name) != first.get(name)})
    raise RuntimeError(
        f"Ranks {others} have another scaffold than rank 0{f', the first tensor is {names[0]!r}' if names else ''}: "
        f"{ {rank: found[rank] for rank in (0, *others)} }. All must use the same seed, family, dtype, model "
        "configuration and hf_lottalora version."
    )


def _of_all_ranks(mine: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


class RanksAgreeCallback(TrainerCallback):
    """Runs `check_ranks_agree` when a `Trainer` starts to train. Accelerate's `prepare` has done so already."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Called by Trainer on every rank."""
        model = getattr(model, "module", model)
        if isinstance(model, PeftModel):
            check_ranks_agree(model)
