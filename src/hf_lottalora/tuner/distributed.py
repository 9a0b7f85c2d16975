"""Every rank draws its own scaffold; this makes sure that they drew the same one."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from peft import PeftModel
from transformers import TrainerCallback

from ..scaffold.tensor import combined_digest


def check_ranks_agree(model: PeftModel) -> None:
    """Compare one combined digest over all ranks. A collective: every rank must call it. Alone it does nothing.

    Raises:
        RuntimeError: a rank has another scaffold; the message names the ranks.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    plan = model.base_model.get_plan()
    mine = combined_digest(plan.seed, plan.scaffold_digests())
    try:
        model.base_model.verify_scaffold()
    except ValueError as error:  # raised on every rank below: one that raised alone would leave the others waiting
        mine = str(error)
    digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, mine)
    others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise RuntimeError(
            f"Ranks {others} have another scaffold than rank 0 ({digests}). All must use the same seed, family, model "
            "configuration and hf_lottalora version."
        )


class RanksAgreeCallback(TrainerCallback):
    """Runs `check_ranks_agree` when a `Trainer` starts to train."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Called by Trainer on every rank."""
        model = getattr(model, "module", model)
        if isinstance(model, PeftModel):
            check_ranks_agree(model)
