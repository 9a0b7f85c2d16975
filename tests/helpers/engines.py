"""Accelerate's engines on CPU processes. Without this it falls back to DDP there, silently: assert what is active."""

from __future__ import annotations

import functools
import os
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from transformers import training_args
from transformers.integrations.deepspeed import unset_hf_deepspeed_config


def allow_fsdp() -> None:
    """From now on a plugin for FSDP means FSDP, as it does where there is an accelerator device."""
    theirs = AcceleratorState.__init__

    @functools.wraps(theirs)
    def __init__(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:  # noqa: N807
        first = not AcceleratorState._shared_state
        theirs(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if first and fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            for state in (AcceleratorState._shared_state, PartialState._shared_state):
                state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = __init__


def allow_deepspeed() -> None:
    """From now on DeepSpeed runs on CPU processes, over gloo; without this each of them would train alone."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled, for minutes
    training_args.is_torch_bf16_gpu_available = lambda: True  # use_cpu, which it asks for, would leave DeepSpeed out
    theirs = PartialState._prepare_backend

    @functools.wraps(theirs)
    def _prepare_backend(self: Any, cpu: bool = False, *args: Any, **kwargs: Any) -> Any:
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and "LOCAL_RANK" in os.environ:
            return "gloo", DistributedType.MULTI_CPU
        return theirs(self, cpu, *args, **kwargs)

    PartialState._prepare_backend = _prepare_backend


def forget() -> None:
    """The next Trainer of this process chooses its engine anew."""
    AcceleratorState._reset_state(reset_partial_state=True)
    unset_hf_deepspeed_config()
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]
