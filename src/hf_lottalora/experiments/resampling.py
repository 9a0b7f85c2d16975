"""Resampling the scaffold during training ("Meta-LoRA", paper section 3, finding 2): the ablation that breaks it.

The paper's schedules: a new scaffold each epoch; each step, with the gradients over k scaffolds accumulated; or each
batch in k sub-batches with one scaffold each.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from peft import PeftModel
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

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
        ValueError: an unknown schedule, a number of scaffolds that is no positive integer or, with "epoch", not 1, or a
            model without a LottaLoRA adapter.

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
        """Draw the next scaffold; returns its seed. Raises as `set_scaffold_seed`."""
        seed = self._seed_of(self.drawn + 1)
        with silent():  # the training loop has a bar of its own
            self.tuner.set_scaffold_seed(seed)
        self.drawn += 1
        return seed

    def state_dict(self) -> dict[str, int]:
        """Where it is in its sequence: the first seed, and how many scaffolds were drawn since."""
        return {"seed": self.seed, "drawn": self.drawn}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where another one was: the model gets the scaffold that was drawn last, if it has not got it."""
        self.seed, self.drawn = state["seed"], state["drawn"]
        seed = self._seed_of(self.drawn)
        if self.tuner.first_plan.seed != seed:
            self.tuner.set_scaffold_seed(seed)

    def _seed_of(self, number: int) -> int:
        if number == 0:
            return self.seed
        message = struct.pack("<QQ", self.seed, number)
        return int.from_bytes(hashlib.blake2b(message, digest_size=8, person=b"resampling").digest(), "little")

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
            The loss, detached, on the CPU, shape `()`.

        Raises:
            ValueError: fewer rows than sub-batches; or as `set_scaffold_seed`.
        """
        parts = [(batch, 1.0)]
        if self.schedule == "step":
            parts = [(batch, 1 / self.scaffolds)] * self.scaffolds
        elif self.schedule == "micro_batch":
            rows = len(batch[0]) if batch else 0
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


class ResampleScaffoldCallback(TrainerCallback, ExportableState):
    """The same for `transformers.Trainer`: a new scaffold per epoch, per step, or per micro-batch.

    "micro_batch" draws for each forward pass, `gradient_accumulation_steps` of them per step. To accumulate gradients
    of the *same* batch over several scaffolds, use `ScaffoldResampler` in a loop of your own.

    A checkpoint has the scaffold of its moment. `trainer.train(resume_from_checkpoint=...)` goes on with it, and with
    the sequence of seeds, to the bit; for that, pass the callback to `Trainer(callbacks=[...])`, over a model that is
    built from the same first seed. Only the last scaffold is left at the end, so there is no best model to load.

    Args:
        schedule: "epoch", "step" or "micro_batch".

    Raises:
        ValueError: an unknown schedule. When the Trainer is made, or starts: `load_best_model_at_end`, a model without
            a LottaLoRA adapter, or a checkpoint that was made without this callback or over another first seed.
    """

    def __init__(self, schedule: Schedule) -> None:
        if schedule not in get_args(Schedule):
            raise ValueError(f"schedule must be one of {list(get_args(Schedule))}, got {schedule!r}.")
        self.schedule = schedule
        self.resampler: ScaffoldResampler | None = None
        self._begun = False  # whether the epoch that is about to begin has its scaffold: resumed within it

    def state(self) -> dict[str, Any]:
        """Called by Trainer, which keeps it in a checkpoint's trainer_state.json."""
        state = {} if self.resampler is None else self.resampler.state_dict()
        return {"args": {"schedule": self.schedule}, "attributes": {"resumed": state}}

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Called by Trainer: from here on a checkpoint may be loaded that has another of the sequence's scaffolds."""
        self._check(args)
        tuner_of(model).follows_checkpoints = True

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Called by Trainer, after a checkpoint was loaded."""
        self._check(args)
        tuner = tuner_of(model)
        first = tuner.followed_from
        tuner.follows_checkpoints, tuner.followed_from = False, None
        self.resampler = ScaffoldResampler(model, self.schedule)
        self._begun = False
        if not state.global_step:
            return
        stored = state.stateful_callbacks.get(type(self).__name__)
        found = stored["attributes"]["resumed"] if isinstance(stored, dict) else {}
        if not found or stored["args"]["schedule"] != self.schedule or first not in (None, found["seed"]):
            here = f"schedule={self.schedule!r} and seed={self.resampler.seed if first is None else first}"
            raise ValueError(
                f"The checkpoint was not made with one ResampleScaffoldCallback of {here}, but with {stored}: its "
                "sequence of scaffolds cannot be gone on with. Use the same callback and LottaLoraConfig(seed=...), or "
                "train from the start."
            )
        self.resampler.load_state_dict(found)
        self._begun = bool(state.epoch % 1)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by Trainer, also for an epoch that it resumes within."""
        if not self._begun:
            self._resample("epoch")
        self._begun = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by Trainer, before the first micro-batch."""
        self._resample("step", "micro_batch")

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by Trainer, between micro-batches."""
        self._resample("micro_batch")

    def _check(self, args: Any) -> None:
        if args.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end=True does not go with ResampleScaffoldCallback: each checkpoint has the "
                "scaffold of its moment, so that not what was trained alone is compared. Pass "
                "load_best_model_at_end=False."
            )

    def _resample(self, *schedules: Schedule) -> None:
        if self.resampler is not None and self.schedule in schedules:
            self.resampler.resample()
