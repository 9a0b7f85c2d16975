"""What an architecture's own initialisation does to each tensor: a constant, or random.

Under `redraw="all"` nothing pretrained may survive, and no value may come from the global generator. So the
architecture's own init is run on a *twin* of the model whose matrices live on the meta device (they cost nothing and
only record whether something random was written), and whose small tensors are real: two runs under two private seeds
tell constants from random values, and yield the constants, whatever the architecture makes them (ones, zeros,
1e-6, log(1..n), sinusoids).
"""

from __future__ import annotations

import copy
import inspect
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


class InitialValue(NamedTuple):
    """How the architecture initialises one tensor.

    Attributes:
        random: whether its init makes it random.
        value: the value its init gives, or None for a matrix (only `random` is known) and for a tensor that no init
            code touches.
    """

    random: bool
    value: torch.Tensor | None


class PrivateRandomness(TorchDispatchMode):
    """Within it this thread draws from generators of its own: torch's global ones are neither read nor moved.

    Saving and restoring those, as `torch.random.fork_rng` does, would undo what other threads draw meanwhile.

    Attributes:
        written: the storages that an in-place random operation wrote to.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.written: set[int] = set()
        self.seed = seed
        self.generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        if func.overloadpacket.__name__.endswith("_"):
            self.written.add(args[0].untyped_storage()._cdata)
            if args[0].is_meta:
                return args[0]  # nothing to write; torch's own way to do that takes long
        first = args[0] if args else None
        device = first.device if isinstance(first, torch.Tensor) else torch.device(kwargs.get("device") or "cpu")
        seeded = _with_generator(func)
        if seeded is None or device.type == "meta" or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        if device not in self.generators:
            self.generators[device] = torch.Generator(device).manual_seed(self.seed)
        return seeded(*args, **{**kwargs, "generator": self.generators[device]})


@cache
def _with_generator(operation: Any) -> Any:
    """The overload that takes a generator besides: `rand(size)` is another one than with it. None for dropout."""

    def arguments(overload: Any) -> set[tuple[str, str]]:
        return {(argument.name, str(argument.type)) for argument in overload._schema.arguments}

    packet = operation.overloadpacket
    for overload in (operation, *(getattr(packet, name) for name in packet.overloads())):
        if "generator" in dict(arguments(overload)) and arguments(operation) | arguments(overload) == arguments(
            overload
        ):
            return overload
    return None


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
        for value in vars(module).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:  # of the old weight_norm: cannot be copied
                memo[id(value)] = value.detach().clone()
        if hasattr(module, "_hf_hook"):  # Accelerate's: it may hold all weights that are offloaded
            memo[id(module._hf_hook)] = module._hf_hook
    twins = [memo[id(tensor)] for tensor in live]
    twin = copy.deepcopy(model, memo)

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
    with torch.no_grad(), PrivateRandomness(seed) as random:
        for tensor in tensors:
            if isinstance(tensor, nn.Parameter) and tensor.is_floating_point() and not tensor.is_meta:
                tensor.fill_(torch.nan)  # what is NaN afterwards, no init code touched
        if isinstance(twin, PreTrainedModel):
            for module in twin.modules():
                module._is_hf_initialized = False  # type: ignore[assignment]
            # Without its decorator, which exchanges functions of torch.nn.init for every thread.
            inspect.unwrap(type(twin).initialize_weights)(twin)
        else:
            for module in twin.modules():
                for name in ("reset_parameters", "_reset_parameters"):  # nn.MultiheadAttention has the latter
                    reset = getattr(module, name, None)
                    if callable(reset):
                        reset()
                if isinstance(module, Conv1D):  # its init is in its constructor
                    nn.init.normal_(module.weight, std=0.02)
                    nn.init.zeros_(module.bias)
    return [tensor.detach().clone() for tensor in tensors], random.written
