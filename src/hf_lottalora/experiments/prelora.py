"""PreLoRA (arXiv 2509.21619) for `transformers.Trainer`: full training until it converges, then adapters alone.

What is tested, and how ranks are chosen, is in `prelora_rules`; how a running Trainer is changed, in `prelora_phases`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import torch
from peft import PeftModel
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import ExportableState

from ..config import LottaLoraConfig
from ..paths import owner_of
from ..tuner.export import export_dense
from ..tuner.rebase import rebase
from .prelora_phases import Phases
from .prelora_report import PreLoraReport
from .prelora_rules import family_of
from .prelora_settings import check_settings, check_training, planned, stored_state
from .prelora_trainer import check_trainer
from .prelora_windows import PhaseName, Windows


class PreLoraCallback(TrainerCallback, ExportableState):
    """Train a model whole until it converges, then with adapters of chosen ranks, then these alone, in one `train()`.

    The phases: "full", every weight is trained, until from window to window neither the loss nor the norms of any
    family of weights change by more than the thresholds; "joint", adapters are in and everything is trained; "lora",
    the weights under the adapters, and their biases, are frozen. What carries no adapter goes on training. At both
    changes the optimizer is new, over what is trained then, and the schedule goes on where it was.

    Make the Trainer, then `prelora = PreLoraCallback(...).attach(trainer)` and `trainer.train()`, on one process or
    under DistributedDataParallel, where all decide alike. A checkpoint of any phase is resumed to the bit: make model,
    Trainer and callback as before, then `trainer.train(resume_from_checkpoint=...)`. Weights are loaded by the model's
    own names, all of them: those of ViT and DeiT too, which Trainer writes under other names than it reads.

    Args:
        config: of the adapters, with `redraw="none"`. Ranks and alphas are chosen here, scaled by `lora_alpha / r`.
            Default: LoRA with the Trainer's seed, `train_beta=False` and `save_kept=True`. The paper has no beta; a
            config of yours trains it, unless it says otherwise.
        window: optimizer steps that are averaged for the test.
        thresholds: percent that weights and loss may change; the paper's are (1, 5), (0.5, 2.5) and (0.25, 1).
        windows: how many in a row are compared: the test can first pass after `windows * window` steps.
        ranks: to choose from, in ascending order.
        joint_steps: how long base and adapters train together.
        rewarmup_steps: over how many the learning rate rises again when adapters are alone.
        rank_by: whose change decides ranks: of "weights" (the paper), or of "gradients" (the authors' script), whose
            norms are taken in the last step of a window, clipped as they are then.
        families: patterns for the end of a module's path, by name, as in `rank_pattern`, whose weights are compared
            together. The others are of one family where their paths differ in the layer's number.

    Raises:
        ValueError: a value makes no sense; the message names it.

    Example:
        >>> from hf_lottalora import PreLoraCallback
        >>> PreLoraCallback(window=500, thresholds=(1, 5), ranks=(4, 8, 16)).phase
        'full'
    """

    def __init__(
        self,
        config: LottaLoraConfig | None = None,
        *,
        window: int = 1000,
        thresholds: tuple[float, float] = (0.5, 2.5),
        windows: int = 3,
        ranks: Sequence[int] = (4, 8, 16, 32),
        joint_steps: int = 1000,
        rewarmup_steps: int = 100,
        rank_by: Literal["weights", "gradients"] = "weights",
        families: Mapping[str, str] | None = None,
    ) -> None:
        self.config = config
        self.settings: dict[str, Any] = {
            "window": window,
            "thresholds": list(thresholds),
            "windows": windows,
            "ranks": list(ranks),
            "joint_steps": joint_steps,
            "rewarmup_steps": rewarmup_steps,
            "rank_by": rank_by,
            "families": dict(families or {}),
        }
        check_settings(self.settings)
        self._trainer: Any = None
        self._gradients: dict[str, float] = {}
        self._loss: torch.Tensor | float = 0.0  # of the step so far, on this process

    # ---- what a user calls ----------------------------------------------------------------------------------------

    def attach(self, trainer: Any) -> Self:
        """Let it watch and change this Trainer; it need not be in `callbacks`. Nothing of the model changes yet.

        Raises:
            ValueError: FSDP, DeepSpeed, or another engine or option that it does not go with, by name; a config that
                draws weights, has ranks of its own or adapts what cannot be trained below; a second callback.
        """
        others = [c for c in trainer.callback_handler.callbacks if isinstance(c, PreLoraCallback) and c is not self]
        if others or self._trainer is not None:
            raise ValueError("A Trainer has one PreLoraCallback, and that is attached once. Make both anew.")
        check_trainer(trainer)
        config = self.config
        if config is None:
            config = LottaLoraConfig(seed=trainer.args.seed, redraw="none", train_beta=False, save_kept=True)
        plan = planned(trainer.model, config, self.settings["ranks"])
        self.config, self._trainer = config, trainer
        self.settings["config"] = config.decisive_options()
        self._weights = {adapter.path: adapter.weight for adapter in plan.adapters}
        families = {path: family_of(path, self.settings["families"]) for path in self._weights}
        self._windows = Windows(self.settings, families)
        self._phases = Phases(trainer, config, self.settings["rewarmup_steps"])
        self._training_step, trainer.training_step = trainer.training_step, self._step
        trainer._load_from_checkpoint = self._load
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        return self

    @property
    def phase(self) -> PhaseName:
        """Which it is in: "full", "joint" or "lora"."""
        return "full" if self._trainer is None else self._phases.name

    @property
    def report(self) -> PreLoraReport:
        """What has been seen and decided so far.

        Raises:
            ValueError: it is not attached.
        """
        self._check_attached()
        windows, phases = self._windows, self._phases
        thresholds = self.settings["thresholds"]
        return PreLoraReport(
            tuple(thresholds), tuple(windows.ended), tuple(phases.begun), dict(phases.ranks), dict(windows.families)
        )

    def peft_model(self, base: str | os.PathLike[str] | None = None) -> PeftModel:
        """The trained model as a `PeftModel`, which `save_pretrained` and `push_to_hub` write as an artifact.

        Call it after training. With `save_kept=True` in the config the artifact holds the base, too; without, it loads
        over a base that is named.

        Args:
            base: where the base, as it was trained, is written as a checkpoint of transformers, by the main process.

        Raises:
            ValueError: there are no adapters, since training has not converged; or no base is named that the artifact
                needs, or one that it does not.
            FileExistsError: there are files in that folder.
        """
        self._check_attached()
        model, kept = self._phases.model, self._phases.config.save_kept
        if model is None:
            raise ValueError(
                "There are no adapters: by these thresholds training has not converged (print(prelora.report)), and "
                "every weight was trained. Save the model itself: trainer.save_model()."
            )
        if kept and base is not None:
            raise ValueError(
                "With save_kept=True the artifact holds its base. Leave base out, or pass save_kept=False."
            )
        if not kept and base is None:
            raise ValueError(
                "With save_kept=False the artifact needs the base that was trained. Name a folder to write it to, "
                "peft_model(base=...), or pass save_kept=True."
            )
        rebase(model.base_model, "default")
        if base is not None:
            model.peft_config["default"].base_model_name_or_path = os.fspath(base)
            if self._trainer.is_world_process_zero():
                export_dense(model, base, adapter_names=[])
        return model

    # ---- what Trainer calls ---------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Called by Trainer, which keeps it in a checkpoint's trainer_state.json."""
        attributes = {}
        if self._trainer is not None:  # it asks when it is made, too
            attributes = {"phases": self._phases.state_dict(), "windows": self._windows.state_dict()}
        return {"args": self.settings, "attributes": attributes}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by Trainer, after a checkpoint was loaded."""
        self._check_attached()
        model, phases = self._trainer.model, self._phases
        if phases.begun and not state.global_step:
            raise ValueError("PreLoRA trains a model once. Make model, Trainer and callback anew.")
        check_training(self.settings, state.max_steps, self._trainer.lr_scheduler)
        if isinstance(model, PreTrainedModel):  # else it writes the hub's names, which differ for ViT and DeiT
            model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
        if phases.begun:
            phases.rewarm()
        else:
            phases.start()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by Trainer, while there are gradients."""
        last = self._windows.steps + 1 == self.settings["window"]
        if self.phase == "full" and last and self.settings["rank_by"] == "gradients":
            self._gradients = self._norms(lambda weight: weight.grad)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by Trainer, before it logs, evaluates and saves."""
        trainer, windows, phases, step = self._trainer, self._windows, self._phases, state.global_step
        # At each step: a checkpoint has the state of the main process, and is resumed by all.
        windows.add(trainer.accelerator.reduce(self._loss, "mean"))
        self._loss = 0.0
        last = step >= state.max_steps
        if windows.full:
            norms = None
            if phases.name == "full":
                norms = {"weights": self._norms(lambda weight: weight), "gradients": self._gradients}
            passed = windows.end(step, phases.name, norms)
            self._log(windows.logged(), control)
            if passed and not last:
                phases.join(windows.choose_ranks(), step)
                self._log(windows.logged_ranks(phases.ranks), control)
        if phases.name == "joint" and step - phases.begun[-1].start >= self.settings["joint_steps"] and not last:
            phases.freeze(step)

    # ---- how it is done -------------------------------------------------------------------------------------------

    def _check_attached(self) -> None:
        if self._trainer is None:
            raise ValueError("PreLoraCallback has to change its Trainer: call prelora.attach(trainer) before train().")

    def _log(self, entry: dict[str, float], control: Any) -> None:
        due = control.should_log
        self._trainer.log(entry)
        control.should_log = due  # which logging has switched off

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        """In the place of `Trainer.training_step`: no hook has the loss of a step."""
        loss = self._training_step(*args, **kwargs)
        exact = torch.float32 if loss.device.type == "mps" else torch.float64
        self._loss = self._loss + loss.detach().to(exact)
        return loss

    def _norms(self, of: Callable[[torch.Tensor], torch.Tensor | None]) -> dict[str, float]:
        """||.|| of each adapted weight, or of what belongs to it, by module path: equal on all processes."""
        tensors = [of(getattr(*owner_of(self._trainer.model, weight))) for weight in self._weights.values()]
        device = self._trainer.args.device
        norms = [torch.zeros((), device=device) if t is None else t.detach().float().norm().to(device) for t in tensors]
        reduced = self._trainer.accelerator.reduce(torch.stack(norms), "mean")
        return dict(zip(self._weights, reduced.tolist(), strict=True))

    def _load(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """In the place of `Trainer._load_from_checkpoint`, the first that knows the checkpoint: adapters, then weights.

        Raises:
            ValueError: as `stored_state`, before anything changes; or the weights are another model's.
        """
        if self._phases.begun:
            raise ValueError("PreLoRA resumes into a new model. Make model, Trainer and callback anew.")
        folder = Path(resume_from_checkpoint)
        found = stored_state(folder, type(self).__name__, self.settings)
        self._phases.restore(found["phases"], folder)
        self._windows.load_state_dict(found["windows"])
