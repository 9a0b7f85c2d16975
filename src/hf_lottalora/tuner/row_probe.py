"""Where the rows of a batch are inside a model: it is run on the first row alone and on the first two.

What has size 1 in the one run and 2 in the other has the rows first. A size alone would not tell: a table of relative
positions is called with the length of a sequence, which can be that of the batch. And where tensors are read is
watched operation by operation, since the code of a model may read a tensor that stands in another module.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import recursively_apply
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.cache_utils import Cache

from ..plan.initialization import PrivateRandomness

_NO_ROWS = {"cache_position"}  # of transformers: shape (tokens,)
_STATELESS = (torch.Tensor, bool, int, float, str, torch.dtype, torch.device, type(None))


@dataclass(frozen=True)
class FoundRows:
    """What the two runs have shown.

    Attributes:
        called: the paths of modules that were called.
        rows_first: of these, the ones whose output is a tensor with the rows of the batch first, each time they were
            called; for each leaf of the inputs whether it has them, too. At least one has, and none has a state, as
            caches have.
        reads: by path of each tensor that was read, the modules that were running, outermost first.
    """

    called: frozenset[str]
    rows_first: dict[str, tuple[bool, ...]]
    reads: dict[str, frozenset[tuple[str, ...]]]

    def inside(self, path: str) -> frozenset[str]:
        """The tensors that are read while this module runs."""
        return frozenset(tensor for tensor, reads in self.reads.items() if any(path in running for running in reads))


def structure(inputs: Any) -> str:
    """What the inputs of a model are like, whatever their values and sizes, but for sizes of 1."""

    def describe(leaf: Any) -> str:
        if isinstance(leaf, torch.Tensor):
            return f"tensor {[size > 1 for size in leaf.shape[1:]]}"
        if isinstance(leaf, Cache):
            return f"{type(leaf).__name__} {leaf.get_seq_length() > 0}"
        return repr(leaf) if isinstance(leaf, (bool, str, type(None))) else type(leaf).__name__

    return repr(recursively_apply(describe, inputs, test_type=lambda leaf: True))


def find_rows(
    model: nn.Module,
    forward: Callable[..., Any],
    inputs: tuple[tuple[Any, ...], dict[str, Any]],
    rows: int,
    watched: Mapping[str, torch.Tensor],
    prefix: str = "",
) -> FoundRows:
    """Run `forward` on the first row and on the first two of copies of `inputs`, which have so many rows.

    Args:
        model: whose modules are looked at, but for those inside PEFT's layers.
        forward: its own.
        inputs: positional and keyword arguments.
        rows: at least 2.
        watched: the tensors that stand in the model, by path.
        prefix: the path of `model`, with which those of its modules begin.

    Raises:
        ValueError: the inputs have not so many rows, it cannot be told which of them have, or the model does not run
            on some of them.
    """
    _check_told_apart(check_rows(inputs, rows), rows)
    runs = []
    for count in (1, 2):
        run = _Run(model, prefix, watched)
        try:
            args, kwargs = _first_rows(inputs, rows, count)
            with torch.no_grad(), PrivateRandomness(), _no_autocast_cache(), run:
                forward(*args, **kwargs)
        except Exception as error:  # whatever a foreign forward raises, or a cache that has no rows
            raise ValueError(
                f"adapter_names needs to know where the rows of a batch are in {type(model).__name__}. It was run on "
                f"the first {count} of {rows} rows to find out, and raised {type(error).__name__}: {error} Run the "
                "adapters one after the other with set_adapter."
            ) from error
        finally:
            run.stop()
        runs.append(run)
    one, two = runs
    rows_first = {path: _rows_first(calls, two.calls.get(path, [])) for path, calls in one.calls.items()}
    return FoundRows(
        called=frozenset(one.calls) | frozenset(two.calls),
        rows_first={path: flags for path, flags in rows_first.items() if flags is not None},
        reads={path: frozenset(one.reads[path] | two.reads[path]) for path in watched if path in two.reads},
    )


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """Autocast keeps casts of parameters, and would read each once only, for one of the calls that are looked at."""
    enabled = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


def check_rows(inputs: tuple[tuple[Any, ...], dict[str, Any]], rows: int) -> list[torch.Tensor]:
    """The inputs that have so many rows.

    Raises:
        ValueError: there is none.
    """
    found: list[torch.Tensor] = []
    recursively_apply(found.append, inputs)
    tensors = [tensor for tensor in found if _size(tensor) == rows]
    if not tensors:
        sizes = [tuple(tensor.shape) for tensor in found]
        raise ValueError(f"adapter_names has {rows} names, and no input has so many rows: they have shapes {sizes}.")
    return tensors


def _check_told_apart(tensors: list[torch.Tensor], rows: int) -> None:
    if any(rows in tensor.shape[1:] for tensor in tensors) and any(tensor.dim() == 1 for tensor in tensors):
        raise ValueError(
            f"adapter_names cannot tell whether an input of shape ({rows},) has an entry for each of {rows} rows: "
            f"another one has size {rows} elsewhere too. Pad the batch by a token, or leave out what is not needed."
        )


def _first_rows(inputs: Any, rows: int, count: int) -> Any:
    """A copy of the inputs, of which nothing that the model changes is seen outside."""

    def cut(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return leaf.detach()[:count] if _size(leaf) == rows else leaf.detach()
        leaf = copy.deepcopy(leaf)
        leaf.batch_select_indices(torch.arange(count))
        return leaf

    args, kwargs = inputs
    whole = {name: value for name, value in kwargs.items() if name in _NO_ROWS}
    kwargs = {name: value for name, value in kwargs.items() if name not in _NO_ROWS}
    args, kwargs = recursively_apply(
        cut, (args, kwargs), test_type=lambda leaf: isinstance(leaf, (torch.Tensor, Cache))
    )
    return copy.deepcopy((args, {**kwargs, **whole}))


def _rows_first(one: list[_Call], two: list[_Call]) -> tuple[bool, ...] | None:
    if len(one) != len(two):
        return None
    found: set[tuple[bool, ...]] = set()
    for (inputs, output), (inputs_2, output_2) in zip(one, two, strict=True):
        pairs = list(zip(inputs, inputs_2, strict=False))
        flags = tuple(pair == (1, 2) for pair in pairs)
        others = all(a == b for a, b in pairs if (a, b) != (1, 2))
        if len(inputs) != len(inputs_2) or not others or not any(flags) or (output, output_2) != (1, 2):
            return None
        found.add(flags)
    return found.pop() if len(found) == 1 else None


_Call = tuple[list[int | None], int | None]  # the first sizes of the inputs' leaves, and of the output


def _size(value: Any) -> int | None:
    return len(value) if isinstance(value, torch.Tensor) and value.dim() else None


def _sizes(inputs: Any, output: Any) -> _Call:
    leaves = tree_leaves(inputs)
    if any(not isinstance(leaf, _STATELESS) for leaf in leaves):
        return [], None  # what has a state must not be called twice for one batch
    return [_size(leaf) for leaf in leaves], _size(output)


class _Run(TorchDispatchMode):
    """One run: the calls of modules, and the reads of watched tensors, also through views of them."""

    def __init__(self, model: nn.Module, prefix: str, watched: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.calls: defaultdict[str, list[_Call]] = defaultdict(list)
        self.reads: defaultdict[str, set[tuple[str, ...]]] = defaultdict(set)
        self.running: list[str] = []
        self.paths = {tensor.untyped_storage()._cdata: path for path, tensor in watched.items()}
        self.handles: list[Any] = []
        self._watch(model, prefix)

    def _watch(self, module: nn.Module, path: str) -> None:
        for name, child in module.named_children():
            below = f"{path}.{name}" if path else name

            def enter(module: nn.Module, args: Any, kwargs: Any, below: str = below) -> None:
                self.running.append(below)

            def leave(module: nn.Module, args: Any, kwargs: Any, output: Any, below: str = below) -> None:
                self.running.pop()
                own = {name: value for name, value in kwargs.items() if name != "adapter_names"}
                self.calls[below].append(_sizes((args, own), output))

            self.handles.append(child.register_forward_pre_hook(enter, with_kwargs=True))
            self.handles.append(child.register_forward_hook(leave, with_kwargs=True))
            if not isinstance(child, BaseTunerLayer):
                self._watch(child, below)

    def stop(self) -> None:
        """Take the hooks away."""
        for handle in self.handles:
            handle.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if type(tensor) in (torch.Tensor, nn.Parameter):
                path = self.paths.get(tensor.untyped_storage()._cdata)
                if path is not None:
                    self.reads[path].add(tuple(self.running))
        return func(*args, **(kwargs or {}))
