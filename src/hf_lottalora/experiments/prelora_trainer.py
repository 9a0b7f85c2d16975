"""Changing what a running Trainer trains: adapters put into its model, weights frozen, a new optimizer for the rest.

The training loop holds the model, and its wrapper of DistributedDataParallel, in variables of its own: both can be
changed in place only. It reads optimizer and schedule from the trainer at each step, so these are replaced.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from ..config import LottaLoraConfig
from ..paths import clean_modules
from ..tuner.rebase import forget_originals


def check_trainer(trainer: Any) -> None:
    """Whether this Trainer's model, optimizer and schedule can be exchanged while it trains.

    Raises:
        ValueError: they cannot; the message names what stands in the way.
    """
    args, kind = trainer.args, trainer.accelerator.distributed_type
    refused = {
        f"{kind.value}: it holds on to the parameters that it was given. Use one process, or DistributedDataParallel": (
            kind != DistributedType.NO and not kind.value.startswith("MULTI_")
        ),
        "several GPUs in one process (DataParallel). Start it with torchrun, or show it one of them": args.n_gpu > 1,
        "a PeftModel: it trains the whole model first. Give Trainer the model itself": (
            isinstance(trainer.model, PeftModel)
        ),
        "optimizers=(...): it makes a new one at each change. Pass TrainingArguments(optim=...), or "
        "optimizer_cls_and_kwargs": trainer.optimizer is not None or trainer.lr_scheduler is not None,
        "model_init: each train() would begin with another model. Pass model=": trainer.model_init is not None,
        "load_best_model_at_end=True: the best model may be one of another phase. Leave it out": (
            args.load_best_model_at_end
        ),
        "restore_callback_states_from_checkpoint=True: it restores itself. Leave it out": (
            args.restore_callback_states_from_checkpoint
        ),
        "auto_find_batch_size=True: training would begin again. Leave it out": args.auto_find_batch_size,
        "torch_compile=True. Leave it out": args.torch_compile,
    }
    for what, found in refused.items():
        if found:
            raise ValueError(f"PreLoRA does not go with {what}.")


def inject(model: nn.Module, config: LottaLoraConfig, ranks: Mapping[str, int]) -> PeftModel:
    """Put adapters of these ranks into the model, in place. What is trained is then as PEFT leaves it.

    Each adapter is scaled by `lora_alpha / r` of the config, whatever its rank, and with `use_rslora` by
    `lora_alpha / sqrt(rank)`. Torch's generators are left alone: A is drawn from the config's seed.

    Args:
        model: the bare model; the PeftModel that is returned is another way to it.
        config: of adapters, with `redraw="none"`.
        ranks: by module path.
    """
    keys = {f"^{re.escape(path)}": rank for path, rank in ranks.items()}
    scaling = (config.lora_alpha or 0.0) / config.r  # which the config has filled in
    alphas = {} if config.use_rslora else {key: rank * scaling for key, rank in keys.items()}
    chosen: dict[str, Any] = {"rank_pattern": keys, "alpha_pattern": alphas}
    config = dataclasses.replace(config, **chosen)
    with warnings.catch_warnings():
        # It warns of tensors that the artifact will not contain; `peft_model` asks for a base beside it.
        warnings.filterwarnings("ignore", message="redraw='none' keeps")
        peft_model = get_peft_model(model, config)
    forget_originals(peft_model.base_model, "default")
    return peft_model


def frozen_in(model: nn.Module) -> set[str]:
    """Paths of what is not trained of the base model."""
    return {path for path, parameter in base_parameters(model) if not parameter.requires_grad}


def train_all_but(model: nn.Module, frozen: set[str]) -> None:
    """Of the base model, under any adapters, train everything but what lies at these paths."""
    for path, parameter in base_parameters(model):
        parameter.requires_grad_(path not in frozen)


def base_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The base model's own by the paths that they had before adapters, a tied one by each."""
    return [
        (f"{path}.{name}" if path else name, parameter)
        for path, module in clean_modules(model)
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.is_floating_point()
    ]


def renew(trainer: Any) -> None:
    """A new optimizer over what is trained now, and the schedule where it was; under DDP, new buckets for gradients.

    DDP sends what it found when it was made. Of parameters that came later each process would keep its own gradients,
    and the processes would drift apart without an error.
    """
    accelerator, wrapper = trainer.accelerator, trainer.model_wrapped
    if isinstance(wrapper, DistributedDataParallel):
        handler = accelerator.ddp_handler
        options: dict[str, Any] = {} if handler is None else handler.to_kwargs()
        options |= {"device_ids": wrapper.device_ids, "output_device": wrapper.output_device}
        DistributedDataParallel.__init__(wrapper, wrapper.module, **options)
        if handler is not None:
            handler.register_comm_hook(wrapper)
    accelerator._optimizers.remove(trainer.optimizer)  # else its moments of all weights stay in memory
    trainer.optimizer = None
    trainer.create_optimizer()
    trainer.optimizer = accelerator.prepare(trainer.optimizer)
    trainer.lr_scheduler = None
    trainer.create_scheduler(num_training_steps=trainer.state.max_steps)
    trainer.callback_handler.optimizer = trainer.optimizer
    trainer.callback_handler.lr_scheduler = trainer.lr_scheduler


def rewarm(schedule: LambdaLR, start: int, steps: int) -> None:
    """Multiply a schedule by 1/steps, 2/steps, ..., 1 from step `start` on."""

    def warmed(rate: Any) -> Any:
        return lambda step: rate(step) * min(1.0, (step - start + 1) / steps)

    if steps:
        schedule.lr_lambdas = [warmed(rate) for rate in schedule.lr_lambdas]


def set_step(schedule: LambdaLR, step: int) -> None:
    """Go on with a new schedule at a step, as if it had been there before."""
    schedule.last_epoch, schedule._step_count = step, step + 1
    rates = [base * rate(step) for base, rate in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates


def load_strictly(model: nn.Module, folder: Path) -> None:
    """Load a checkpoint's weights by the model's own names, all of them.

    Trainer loads what it finds under the names there are, and only warns of the rest. It also writes ViT and DeiT
    under the hub's older names, of which it then finds few.

    Raises:
        ValueError: a tensor is missing, of another shape, or not of this model. Nothing was loaded.
    """
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        found.update(load_file(file))
    live = model.state_dict(keep_vars=True)
    tied = {id(live[name]) for name in live.keys() & found.keys()}
    unsaved = set(getattr(model, "_keys_to_ignore_on_save", None) or ())  # which the architecture's config decides
    missing = sorted(name for name in live.keys() - found.keys() - unsaved if id(live[name]) not in tied)
    unknown = sorted(found.keys() - live.keys())
    other = sorted(name for name in live.keys() & found.keys() if live[name].shape != found[name].shape)
    if missing or unknown or other:
        raise ValueError(
            f"{folder} has the weights of another model: {len(missing)} of {len(live)} tensors are missing, "
            f"{len(unknown)} are unknown and {len(other)} have another shape, such as "
            f"{[*missing, *unknown, *other][0]!r}. Nothing was loaded. Resume with the model that it was made with."
        )
    model.load_state_dict(found, strict=False)
