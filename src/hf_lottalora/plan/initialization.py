"""What an architecture's own initialisation does to each tensor: a constant, or random.

Under `redraw="all"` nothing pretrained may survive, and no value may come from the global generator. So the
architecture's own init is run on a *twin* of the model whose matrices live on the meta device (they cost nothing and
only record whether something random was written), and whose small tensors are real: two runs under two private seeds
tell constants from random values, and yield the constants, whatever the architecture makes them (ones, zeros,
1e-6, log(1..n), sinusoids).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

_RANDOM_OPS = ("normal_", "uniform_", "random_", "bernoulli_", "exponential_", "cauchy_", "log_normal_", "geometric_")


class InitialValue(NamedTuple):
    """How the architecture initialises one tensor.

    Attributes:
        random: whether its init makes it random.
        value: the value its init gives, or None for a matrix (only `random` is known) and for a tensor that no init
            code touches.
    """

    random: bool
    value: torch.Tensor | None


@contextmanager
def untouched_rng() -> Iterator[None]:
    """Leave torch's global generators, on every device, as they were found."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    devices = range(torch.accelerator.device_count()) if accelerator else ()
    kind = accelerator.type if accelerator else "cuda"
    with torch.random.fork_rng(devices=devices, device_type=kind):
        yield


class _RandomWrites(TorchDispatchMode):
    """Remembers the storages that an in-place random operation wrote to."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in _RANDOM_OPS:
            self.storages.add(args[0].untyped_storage()._cdata)
            if args[0].is_meta:
                return args[0]  # nothing to write; torch's own way to do that takes long
        return func(*args, **(kwargs or {}))


def architecture_init(model: nn.Module, matrices: set[int]) -> dict[int, InitialValue]:
    """Probe `model`'s own init without touching it.

    Args:
        model: any module; a `PreTrainedModel` brings `_init_weights`, others the `reset_parameters` of their parts.
        matrices: ids of the parameters whose values are not needed, only whether they are random.

    Returns:
        One `InitialValue` per parameter and persistent buffer of `model`, by the id of the live tensor.
    """
    live: list[torch.Tensor] = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        device = "meta" if id(parameter) in matrices else "cpu"
        empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().clone()
    for module in model.modules():
        if hasattr(module, "_hf_hook"):  # Accelerate's: it may hold all weights that are offloaded
            memo[id(module._hf_hook)] = module._hf_hook
    twins = [memo[id(tensor)] for tensor in live]
    twin = copy.deepcopy(model, memo)

    with untouched_rng():
        first, written = _run_init(twin, twins, seed=0)
        second, _ = _run_init(twin, twins, seed=1)
    result = {}
    for tensor, copied, a, b in zip(live, twins, first, second, strict=True):
        if copied.is_meta:
            result[id(tensor)] = InitialValue(copied.untyped_storage()._cdata in written, None)
        elif a.is_floating_point() and bool(a.isnan().any()):
            result[id(tensor)] = InitialValue(False, None)
        else:
            result[id(tensor)] = InitialValue(not torch.equal(a, b), a)
    return result


def _run_init(twin: nn.Module, tensors: list[torch.Tensor], seed: int) -> tuple[list[torch.Tensor], set[int]]:
    torch.default_generator.manual_seed(seed)
    with torch.no_grad(), _RandomWrites() as recorder:
        for tensor in tensors:
            if isinstance(tensor, nn.Parameter) and tensor.is_floating_point() and not tensor.is_meta:
                tensor.fill_(torch.nan)  # what is NaN afterwards, no init code touched
        if isinstance(twin, PreTrainedModel):
            for module in twin.modules():
                module._is_hf_initialized = False  # type: ignore[assignment]
            twin.initialize_weights()
        else:
            for module in twin.modules():
                for name in ("reset_parameters", "_reset_parameters"):  # nn.MultiheadAttention has the latter
                    reset = getattr(module, name, None)
                    if callable(reset):
                        reset()
                if isinstance(module, Conv1D):  # its init is in its constructor
                    nn.init.normal_(module.weight, std=0.02)
                    nn.init.zeros_(module.bias)
    return [tensor.detach().clone() for tensor in tensors], recorder.storages
