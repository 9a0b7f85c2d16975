"""Accelerate's engines: what each needs to train a model over a scaffold, and which do not.

A weight is a function of seed, name and index, so no rank receives one: under FSDP2 and ZeRO-3 each draws its own
shard, and a scaffold that is packed or streamed is not sharded at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, compare_versions
from peft import PeftModel
from torch import nn

from ..artifact.manifest import record_kept
from ..artifact.peft_methods import wrap
from ..paths import owner_of
from ..residency.partitions import gathered, is_partitioned
from ..residency.shards import is_sharded
from ..residency.virtual_weight import VirtualWeight, addresses
from . import zero
from .distributed import check_ranks_agree
from .model import LottaLoraModel

_EFFICIENT_LOADING = (
    "cpu_ram_efficient_loading=True broadcasts every weight from rank 0, and here each rank draws its own shard. "
    "Switch it off: fsdp_cpu_ram_efficient_loading: false in accelerate's configuration file, "
    "--fsdp_cpu_ram_efficient_loading false for accelerate launch, or "
    'TrainingArguments(fsdp_config={"cpu_ram_efficient_loading": False}).'
)
_FIRST_VERSION = "1.15"  # before, checkpoints under FSDP2 have rank 0's shards of the adapters only


def install() -> None:
    """Put these in the place of Accelerate's, for good; for other models they do what those do."""
    for method in (prepare, get_state_dict):
        wrap(Accelerator, method)


def _ours_in(objects: Any, accelerator: Any) -> PeftModel | None:
    """The model over a scaffold that is among these."""
    models = (accelerator.unwrap_model(thing) for thing in objects if isinstance(thing, nn.Module))
    return next((m for m in models if isinstance(m, PeftModel) and isinstance(m.base_model, LottaLoraModel)), None)


def prepare(theirs: Callable[..., Any], accelerator: Any, *args: Any, **kwargs: Any) -> Any:
    """Refuse an engine that would not work, by name and on every rank; else make the model ready for it.

    Raises:
        ValueError: the engine, or an option of it, is not for a model over a scaffold.
        RuntimeError: ranks have different scaffolds; the message names them.
    """
    model = _ours_in(args, accelerator)
    shards = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if model is None or (accelerator.num_processes == 1 and not shards):
        return theirs(accelerator, *args, **kwargs)
    check_engine(accelerator, model)
    check_ranks_agree(model)
    if not shards:
        return theirs(accelerator, *args, **kwargs)
    for plan in model.base_model.plans.values():
        record_kept(plan, partial(model.base_model.base.kept, plan))  # later one rank alone saves
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        result = zero.prepared(partial(theirs, accelerator, *args, **kwargs), accelerator, model.base_model)
        zero.adapt(accelerator.deepspeed_engine_wrapped.engine, partial(_whole_state, model))
        return result
    with _left_out(model.base_model, accelerator.state.fsdp_plugin), addresses():
        return theirs(accelerator, *args, **kwargs)


def check_engine(accelerator: Any, model: PeftModel) -> None:
    """Whether a model over a scaffold can be trained by the engine that Accelerate has chosen.

    Raises:
        ValueError: it cannot; the message says which can.
    """
    kind = accelerator.distributed_type
    if kind in (DistributedType.MEGATRON_LM, DistributedType.XLA):
        raise ValueError(f"{kind.value} is not supported over a scaffold. Use DDP, FSDP2 or DeepSpeed.")
    parallelism = getattr(accelerator, "parallelism_config", None)
    for name in ("tp", "cp", "sp"):
        if (getattr(parallelism, f"{name}_size", 1) or 1) > 1:
            raise ValueError(
                f"ParallelismConfig({name}_size=...) is not supported over a scaffold: only data may be split over "
                "processes (dp_replicate_size, dp_shard_size). Leave it out."
            )
    if kind == DistributedType.DEEPSPEED:
        zero.check_deepspeed(accelerator.state.deepspeed_plugin.deepspeed_config)
    if kind != DistributedType.FSDP:
        return
    plugin = accelerator.state.fsdp_plugin
    if getattr(plugin, "fsdp_version", 1) != 2:
        raise ValueError(
            "FSDP1 flattens weights into one tensor, which cannot be drawn by name. Use FSDP2: fsdp_version: 2 in "
            'accelerate\'s configuration file, or TrainingArguments(fsdp_config={"version": 2}).'
        )
    if compare_versions("accelerate", "<", _FIRST_VERSION):
        raise ValueError(f"FSDP2 over a scaffold needs accelerate >= {_FIRST_VERSION}: pip install -U accelerate.")
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(_EFFICIENT_LOADING)
    if getattr(model.base_model.model, "hf_device_map", None):
        raise ValueError("A model with a device_map cannot be sharded by FSDP2. Build or load it without device_map.")
    wanted = getattr(plugin.mixed_precision_policy, "param_dtype", None)
    held = {tensor.survey.dtype for tensor in model.base_model.first_plan.with_role("scaffold")}
    if model.base_model.residency != "dense" and wanted is not None and held - {wanted}:
        raise ValueError(
            f"Mixed precision computes in {wanted}, and a scaffold that is not sharded stays as it is, here in "
            f"{', '.join(map(str, held))}. Build the model in {wanted}, as with from_config(..., dtype=...), or hold "
            "the scaffold with residency='dense'."
        )
    if isinstance(plugin.ignored_modules, str) and model.base_model.residency != "dense":
        raise ValueError(
            f"ignored_modules={plugin.ignored_modules!r} with residency={model.base_model.residency!r}: pass a list of "
            "modules instead of a regular expression. The scaffold needs none, it is left out anyway."
        )


@contextmanager
def _left_out(tuner: LottaLoraModel, plugin: Any) -> Iterator[None]:
    """While FSDP2 shards: what is packed or streamed stays as it is on each rank."""
    before = plugin.ignored_modules
    if tuner.residency != "dense":
        held = nn.Module()
        for at, path in enumerate(tuner.first_plan.scaffold):
            live = getattr(*owner_of(tuner.model, path))
            if isinstance(live, VirtualWeight):
                held._parameters[str(at)] = live  # type: ignore[assignment]
        plugin.ignored_modules = [*(before or ()), held]
    try:
        yield
    finally:
        plugin.ignored_modules = before


def get_state_dict(theirs: Callable[..., Any], accelerator: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    """What an artifact needs of a sharded model, whole; the scaffold is not gathered. Every rank must call it."""
    ours = _ours_in([model], accelerator)
    if ours is None or accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return theirs(accelerator, model, *args, **kwargs)
    return _whole_state(ours)


def _whole_state(model: PeftModel) -> dict[str, torch.Tensor]:
    tuner = model.base_model
    saved = {path for plan in tuner.plans.values() for path in plan.saved}
    unsaved = {id(getattr(*owner_of(tuner.model, t.path))) for t in tuner.first_plan.tensors if t.path not in saved}
    state: dict[str, torch.Tensor] = model.state_dict()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in unsaved:
            continue
        if is_sharded(parameter):
            state[name] = parameter.detach().full_tensor().cpu()  # type: ignore[operator]
        elif is_partitioned(parameter):
            with gathered([parameter]):
                if dist.get_rank() == 0:
                    state[name] = parameter.detach().to("cpu", copy=True)
    return state
