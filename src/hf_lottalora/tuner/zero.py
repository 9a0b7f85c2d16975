"""DeepSpeed's ZeRO over a scaffold: each rank draws its own runs of it, and none is broadcast when training starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..paths import owner_of
from ..plan.plan import PlannedTensor
from ..residency.shards import RunsOf
from ..residency.virtual_weight import VirtualWeight
from .base_model import replace_parameter
from .model import LottaLoraModel


def check_deepspeed(options: dict[str, Any]) -> None:
    """Whether DeepSpeed's configuration leaves weights what they are, and where they can be compared.

    Raises:
        ValueError: it does not; the option is named.
    """
    zero = options.get("zero_optimization", {})
    refused = {
        "tensor_parallel.autotp_size": (options.get("tensor_parallel", {}).get("autotp_size") or 0) > 1,
        "zero_optimization.zero_quantized_nontrainable_weights": zero.get("zero_quantized_nontrainable_weights"),
        "zero_optimization.offload_param.device: nvme": (zero.get("offload_param") or {}).get("device") == "nvme",
    }
    for name, on in refused.items():
        if on:
            raise ValueError(
                f"DeepSpeed's {name} is not supported over a scaffold, whose weights would not be what the seed draws, "
                "or could not be compared with it. Leave it out of DeepSpeed's configuration."
            )


def prepared(prepare: Callable[[], Any], accelerator: Any, tuner: LottaLoraModel) -> Any:
    """Have DeepSpeed take the model: nothing of the scaffold is broadcast; of what is partitioned, runs are drawn.

    What is packed or streamed stays whole on each rank: as a buffer that is not saved, which DeepSpeed lets alone.
    """
    scaffold = list(tuner.first_plan.with_role("scaffold"))
    for tensor in scaffold:
        _leave_out(tuner, tensor)
    live: dict[int, tuple[PlannedTensor, Any]] = {}
    for tensor in scaffold:
        parameter = getattr(*owner_of(tuner.model, tensor.path))
        live[id(parameter)] = tensor, parameter
        parameter.ds_optim_param = True  # by this mark DeepSpeed leaves frozen weights of its own out of broadcasts
    stage = accelerator.state.deepspeed_plugin.zero_stage
    try:
        with _drawing_runs(tuner, live) if stage == 3 else nullcontext():
            result = prepare()
    finally:
        for _, parameter in live.values():
            del parameter.ds_optim_param
    engine = accelerator.deepspeed_engine_wrapped.engine
    for tensor in scaffold if engine.bfloat16_enabled() or engine.fp16_enabled() else ():  # as DeepSpeed casts the rest
        owner, attribute = owner_of(tuner.model, tensor.path)
        left_out = owner._buffers.get(attribute)
        if left_out is not None:
            owner._buffers[attribute] = left_out.to(engine.get_data_types()[0])
    return result


def adapt(engine: Any, whole_state: Callable[[], dict[str, torch.Tensor]]) -> None:
    """Of one engine of DeepSpeed's: save what the artifact needs, and say what to do with another number of ranks.

    Args:
        engine: that has taken a model over a scaffold.
        whole_state: what of it is saved.
    """
    # Trainer calls it past Accelerator.get_state_dict. It would gather the scaffold, or leave out what is kept.
    engine._zero3_consolidated_16bit_state_dict = lambda *_, **__: whole_state()
    load_checkpoint = engine.load_checkpoint

    def checked(load_dir: str, tag: str | None = None, *args: Any, **kwargs: Any) -> Any:
        folder = Path(load_dir)
        named = tag or (folder / "latest").read_text().strip() if (folder / "latest").is_file() else ""
        written, ranks = len(list((folder / named).glob("*_optim_states.pt"))), dist.get_world_size()
        if written not in (0, ranks):
            raise ValueError(
                f"{load_dir} is a checkpoint of {written} processes, here are {ranks}, and DeepSpeed cannot divide the "
                "optimizer's state anew. Go on from the artifact in it, with a new optimizer: "
                f"PeftModel.from_pretrained(base_model, {str(load_dir)!r}, is_trainable=True)."
            )
        return load_checkpoint(load_dir, tag, *args, **kwargs)

    engine.load_checkpoint = checked


def _leave_out(tuner: LottaLoraModel, tensor: PlannedTensor) -> None:
    live = getattr(*owner_of(tuner.model, tensor.path))
    if tuner.residency == "dense" or not isinstance(live, VirtualWeight):
        return
    for path in {tensor.path, *tensor.survey.aliases}:
        owner, attribute = owner_of(tuner.model, path)
        owner._parameters.pop(attribute, None)  # a shared module is reached by several paths
        owner._buffers[attribute] = live
        owner._non_persistent_buffers_set.add(attribute)


@contextmanager
def _drawing_runs(tuner: LottaLoraModel, live: dict[int, tuple[PlannedTensor, Any]]) -> Iterator[None]:
    """In the place of DeepSpeed's function that sends a parameter from rank 0 to all and cuts it."""
    from deepspeed.runtime.zero.partition_parameters import Init

    theirs = Init._zero_init_param

    def zero_init_param(init: Any, parameter: Any) -> None:
        if id(parameter) not in live:
            return theirs(init, parameter)
        cut: Any = parameter
        if isinstance(parameter, VirtualWeight):
            # DeepSpeed exchanges `data`, which a weight that is not in memory does not allow. This one has its shape
            # and one element.
            shown = torch.empty(1, dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)
            cut = replace_parameter(tuner.model, live[id(parameter)][0], shown)
            cut.contiguous = lambda: RunsOf(parameter)
        init._convert_to_deepspeed_param(cut)
        cut.partition()
        vars(cut).pop("contiguous", None)

    Init._zero_init_param = zero_init_param
    try:
        yield
    finally:
        Init._zero_init_param = theirs
