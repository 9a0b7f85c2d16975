"""Resampling the scaffold during training ("Meta-LoRA", paper section 3, finding 2): the ablation that breaks it.

The paper's schedules: a new scaffold each epoch; each step, with the gradients over k scaffolds accumulated; or each
batch in k sub-batches with one scaffold each.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from peft import PeftModel
from transformers import TrainerCallback

from ..tuner.model import tuner_of
from ..tuner.progress import silent

Schedule = Literal["epoch", "step", "micro_batch"]


class ScaffoldResampler:
    """New scaffolds for a model in a training loop of your own.

    Scaffold n is that of a seed derived from (the model's seed, n): a run can be repeated. The model keeps the last
    scaffold; an artifact saved then has its seed.

    Args:
        model: with a LottaLoRA adapter.
        schedule: when there is a new one: each "epoch", each "step" or each "micro_batch".
        scaffolds: k, how many per step ("step"), or into how many sub-batches a batch is split ("micro_batch").

    Raises:
        ValueError: an unknown schedule, or a number of scaffolds that does not fit it.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from hf_lottalora import LottaLoraConfig
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> model = get_peft_model(net, LottaLoraConfig(seed=42, r=1, target_modules=["0"], modules_to_save=["1"]))
        >>> resampler = ScaffoldResampler(model, "step", scaffolds=2)
        >>> x, y = torch.zeros(8, 4), torch.zeros(8, dtype=torch.long)
        >>> loss = resampler.backward(lambda x, y: torch.nn.functional.cross_entropy(model(x), y), x, y)
        >>> resampler.drawn  # and every epoch begins with resampler.start_epoch()
        2
    """

    def __init__(self, model: PeftModel, schedule: Schedule, scaffolds: int = 1) -> None:
        if schedule not in get_args(Schedule):
            raise ValueError(f"schedule must be one of {list(get_args(Schedule))}, got {schedule!r}.")
        if isinstance(scaffolds, bool) or not isinstance(scaffolds, int) or scaffolds < 1:
            raise ValueError(f"scaffolds must be a positive integer, got {scaffolds!r}.")
        if schedule == "epoch" and scaffolds != 1:
            raise ValueError(f"schedule 'epoch' has one scaffold at a time, got scaffolds={scaffolds}.")
        self.tuner = tuner_of(model)
        self.schedule, self.scaffolds = schedule, scaffolds
        self.seed, self.drawn = self.tuner.first_plan.seed, 0

    def resample(self) -> int:
        """Draw the next scaffold; returns its seed."""
        self.drawn += 1
        message = struct.pack("<QQ", self.seed, self.drawn)
        seed = int.from_bytes(hashlib.blake2b(message, digest_size=8, person=b"resampling").digest(), "little")
        with silent():  # the training loop has a bar of its own
            self.tuner.set_scaffold_seed(seed)
        return seed

    def start_epoch(self) -> None:
        """A new scaffold where the schedule says "epoch"."""
        if self.schedule == "epoch":
            self.resample()

    def backward(self, compute_loss: Callable[..., torch.Tensor], *batch: torch.Tensor) -> torch.Tensor:
        """Gradients of the mean loss of one batch, over as many scaffolds as the schedule says.

        Args:
            compute_loss: maps the tensors of a (sub-)batch to a mean loss of shape `()`.
            batch: tensors with one row per example.

        Returns:
            The loss, detached, shape `()`.

        Raises:
            ValueError: fewer rows than sub-batches.
        """
        parts = [(batch, 1.0)]
        if self.schedule == "step":
            parts = [(batch, 1 / self.scaffolds)] * self.scaffolds
        elif self.schedule == "micro_batch":
            rows = len(batch[0])
            if rows < self.scaffolds:
                raise ValueError(f"A batch of {rows} rows cannot be split into {self.scaffolds} sub-batches.")
            split = zip(*(tensor.tensor_split(self.scaffolds) for tensor in batch), strict=True)
            parts = [(part, len(part[0]) / rows) for part in split]
        total = torch.zeros(())
        for tensors, share in parts:
            if self.schedule != "epoch":
                self.resample()
            loss = compute_loss(*tensors) * share
            loss.backward()
            total = total + loss.detach().cpu()
        return total


class ResampleScaffoldCallback(TrainerCallback):
    """The same for `transformers.Trainer`: a new scaffold per epoch, per step, or per micro-batch.

    "micro_batch" draws for each forward pass, `gradient_accumulation_steps` of them per step. To accumulate gradients
    of the *same* batch over several scaffolds, use `ScaffoldResampler` in a loop of your own. A checkpoint has the seed
    of its moment, and loads into a model of that seed only: leave `load_best_model_at_end` off.

    Args:
        schedule: "epoch", "step" or "micro_batch".

    Raises:
        ValueError: an unknown schedule.
    """

    def __init__(self, schedule: Schedule) -> None:
        if schedule not in get_args(Schedule):
            raise ValueError(f"schedule must be one of {list(get_args(Schedule))}, got {schedule!r}.")
        self.schedule = schedule
        self.resampler: ScaffoldResampler | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Called by Trainer."""
        self.resampler = ScaffoldResampler(model, self.schedule)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by Trainer."""
        self._resample("epoch")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by Trainer, before the first micro-batch."""
        self._resample("step", "micro_batch")

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by Trainer, between micro-batches."""
        self._resample("micro_batch")

    def _resample(self, *schedules: Schedule) -> None:
        if self.resampler is not None and self.schedule in schedules:
            self.resampler.resample()
