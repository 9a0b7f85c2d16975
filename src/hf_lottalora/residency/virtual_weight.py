"""A scaffold weight that is not dense in memory: packed as its random words, as int4 codes, or nowhere ("streamed").

It is a tensor without storage. It has shape, dtype and device, modules hold it as their `weight`, autograd saves it;
only an operation that reads its values makes them, for as long as it runs. The values are those of the dense weight to
the bit, so switching changes no result.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..scaffold.draw import draw_words, random_words, stream_key
from ..scaffold.families import get_family
from ..scaffold.gpu import kernels_for
from ..scaffold.tensor import RUNS, ScaffoldTensor, run_starts
from .int4 import fits_kernel, int4_codes, is_ternary

Residency = Literal["dense", "packed", "int4", "streamed"]

# Values made at a time by a matrix product, 32 MiB in bfloat16. Larger matrices are multiplied in parts, which rounds
# sums over inputs once per part.
CHUNK = 1 << 24
SCRATCH = 1 << 24


# What `virtual_operations` does without making all values, by overload packet of torch.
HANDLERS: dict[Any, Callable[..., Any]] = {}

_UNWRITABLE = "{} would write to a scaffold weight that is not in memory. Call set_residency('dense') first."


_ADDRESSES: ContextVar[bool] = ContextVar("addresses", default=False)


@contextmanager
def addresses() -> Iterator[None]:
    """Within it weights that are not in memory can be told apart by `data_ptr()`, as Accelerate tells parameters."""
    token = _ADDRESSES.set(True)
    try:
        yield
    finally:
        _ADDRESSES.reset(token)


class VirtualWeight(torch.Tensor):
    """A drawn weight whose values are made when they are read.

    Where a matrix product needs them, and for rows of a table, in parts; other operations get all of them.

    Attributes:
        scaffold: what it is.
        words: its random words, uint8 of shape `(bytes,)`; None draws them at each use.
        codes: of the int4 kernel, for products of a few rows; everything else draws.
        dtypes: the dtype it was drawn in, and those it was cast to since; casts round like those of a dense tensor.
        transposed: whether this is the transpose of the (two-dimensional) scaffold tensor.
    """

    scaffold: ScaffoldTensor
    words: torch.Tensor | None
    codes: torch.Tensor | None
    dtypes: tuple[torch.dtype, ...]
    transposed: bool

    @staticmethod
    def __new__(
        cls: type[VirtualWeight],
        scaffold: ScaffoldTensor,
        words: torch.Tensor | None,
        dtypes: tuple[torch.dtype, ...],
        device: torch.device | str = "cpu",
        transposed: bool = False,
        codes: torch.Tensor | None = None,
    ) -> VirtualWeight:
        """See the attributes; `device` is where values are made."""
        shape = scaffold.shape[::-1] if transposed else scaffold.shape
        weight: VirtualWeight = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtypes[-1], device=torch.device(device)
        )
        weight.scaffold, weight.words, weight.codes = scaffold, words, codes
        weight.dtypes, weight.transposed = dtypes, transposed
        return weight

    def _like(self, **changes: Any) -> VirtualWeight:
        """Another handle on the same weight."""
        names = ("scaffold", "words", "dtypes", "device", "transposed", "codes")
        return VirtualWeight(**{**{name: getattr(self, name) for name in names}, **changes})

    @property
    def residency(self) -> Residency:
        """Any but "dense"."""
        return "int4" if self.codes is not None else "streamed" if self.words is None else "packed"

    def assign(self, scaffold: ScaffoldTensor) -> None:
        """Become another scaffold tensor of the same shape, in place."""
        held = held_by(scaffold, self.residency, self.device)
        self.scaffold, self.words, self.codes = scaffold, *held
        self.dtypes = (self.dtype,)
        torch.autograd.graph.increment_version(self)  # a backward over the old values is an error

    def hold(self, residency: Residency) -> None:
        """Change how it is held, in place; not to "dense"."""
        if residency != self.residency:
            self.words, self.codes = held_by(self.scaffold, residency, self.device)

    def holds(self, scaffold: ScaffoldTensor, full: bool, runs: int = RUNS) -> bool:
        """Whether it is this scaffold tensor; looks at so many sampled words in memory, or with `full` at each."""
        if self.scaffold == scaffold and len(self.casts) > 1:  # rounded more often than a draw in this dtype
            starts, length = (
                ([0], scaffold.numel) if full else (run_starts(scaffold.numel)[:runs], min(64, scaffold.numel))
            )
            drawn = VirtualWeight(scaffold, None, (self.dtype,), self.device)
            return torch.equal(self.slices(starts, length), drawn.slices(starts, length))
        if self.codes is not None and full:
            return self.scaffold == scaffold and torch.equal(self.codes, int4_codes(scaffold))
        if self.scaffold != scaffold or self.words is None:
            return self.scaffold == scaffold
        words, key = self.words.cpu().numpy().view("<u8"), stream_key(scaffold.seed, scaffold.name)
        if full:
            return np.array_equal(words, draw_words(key, len(words)))
        return all(np.array_equal(words[at : at + 1], random_words(key, at, 1)) for at in run_starts(len(words))[:runs])

    def slices(self, starts: list[int] | torch.Tensor, length: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """Runs `[start, start + length)` of the flattened scaffold tensor, shape `(len(starts), length)`."""
        drawn, *casts = self.casts
        if out is None:
            out = torch.empty(len(starts), length, dtype=drawn, device=self.device)
        self.scaffold.fill(starts, out, self.words)
        values = out
        for dtype in casts:
            values = values.to(dtype)
        return values

    @property
    def casts(self) -> tuple[torch.dtype, ...]:
        """The dtype to draw in and those to cast to. A float32 draw is exact: its first cast rounds as a draw does."""
        exact = len(self.dtypes) > 1 and self.dtypes[0] in (torch.float32, torch.float64)
        return self.dtypes[1:] if exact else self.dtypes

    def largest(self) -> float:
        """The largest value that the family has at this scale, in the dtype."""
        return _largest(self.scaffold.family, self.scaffold.scale, self.casts)

    def dense(self) -> torch.Tensor:
        """The values as an ordinary tensor."""
        values = self.slices([0], self.scaffold.numel).view(self.scaffold.shape)
        return values.t() if self.transposed else values

    def row_chunks(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """`(first, last + 1, values)` for runs of rows of the scaffold tensor; the values are good until the next."""
        rows, width = self.scaffold.shape[0], self.scaffold.numel // self.scaffold.shape[0]
        step = max(1, CHUNK // width)
        buffer = _buffer(min(step, rows) * width, self.casts[0]) if self.device.type == "cpu" else None
        for first in range(0, rows, step):
            last = min(first + step, rows)
            size = (last - first) * width
            out = None if buffer is None else buffer[:, :size]
            yield first, last, self.slices([first * width], size, out).view(last - first, width)

    # ---- what torch asks of a tensor ------------------------------------------------------------------------------

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # would trace NumPy's drawing
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if torch.is_inference_mode_enabled():
            # There torch could not give what is returned here the version of the weight that it is a view of.
            with torch.inference_mode(False), torch.no_grad():
                return cls._dispatch(func, args, kwargs or {})
        return cls._dispatch(func, args, kwargs or {})

    @staticmethod
    def _dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        handler = HANDLERS.get(func.overloadpacket)
        if handler is not None:
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        given = {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **kwargs}
        for argument in func._schema.arguments:
            written = argument.alias_info is not None and argument.alias_info.is_write
            leaves = tree_leaves(given.get(argument.name)) if written else ()
            if any(isinstance(leaf, VirtualWeight) for leaf in leaves):
                raise RuntimeError(_UNWRITABLE.format(func))
        args, kwargs = tree_map_only(VirtualWeight, VirtualWeight.dense, (args, kwargs))
        return func(*args, **kwargs)

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        """As a tensor's. Assigning another virtual weight takes over what it is; assigning values is refused."""
        data: torch.Tensor = torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]
        return data

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if not isinstance(value, VirtualWeight):
            raise RuntimeError(_UNWRITABLE.format("Assigning to .data"))
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        for name in ("scaffold", "words", "codes", "dtypes", "transposed"):
            setattr(self, name, getattr(value, name))

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: there is no memory to share or write."""
        raise RuntimeError(
            "A scaffold weight that is not in memory has no address to be shared or saved from. An adapter's artifact "
            "needs none: use save_pretrained. For anything else call set_residency('dense') first."
        )

    storage = untyped_storage = __dlpack__  # asked for by safetensors and Accelerate

    def data_ptr(self) -> int:
        """Refused likewise, but within `addresses` a number that no other weight has."""
        return id(self) if _ADDRESSES.get() else self.__dlpack__()  # type: ignore[no-any-return]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"VirtualWeight({self.scaffold}, residency={self.residency!r}, dtype={self.dtype})"

    def share_memory_(self) -> VirtualWeight:
        """As a tensor's, of what there is in memory."""
        for held in (self.words, self.codes):
            if held is not None:
                held.share_memory_()
        return self

    def __setitem__(self, *args: Any) -> None:
        raise RuntimeError(_UNWRITABLE.format("Assigning to an index"))

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) not in memo:
            words, codes = (None if held is None else held.clone() for held in (self.words, self.codes))
            copied = self._like(words=words, codes=codes)
            memo[id(self)] = nn.Parameter(copied, False) if isinstance(self, nn.Parameter) else copied
        return memo[id(self)]  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        parts = (self.scaffold, self.words, self.dtypes, self.device, self.transposed, self.codes)
        return _rebuilt, (*parts, isinstance(self, nn.Parameter))


def _rebuilt(*parts: Any) -> torch.Tensor:
    *arguments, is_parameter = parts
    weight = VirtualWeight(*arguments)
    return nn.Parameter(weight, False) if is_parameter else weight


# What a base model's own state dict pickles to, if it is saved without its tuner.
torch.serialization.add_safe_globals([_rebuilt, ScaffoldTensor])


def pack(scaffold: ScaffoldTensor, device: torch.device | str = "cpu") -> torch.Tensor:
    """All random words of a tensor, uint8 of shape `(bytes,)`: k bits per value, rounded up to whole words."""
    bits = get_family(scaffold.family).bits
    key, count = stream_key(scaffold.seed, scaffold.name), math.ceil(scaffold.numel * bits / 64)
    kernels = kernels_for(torch.device(device))
    if kernels is None:
        return torch.from_numpy(draw_words(key, count).view(np.uint8)).to(device)
    words = torch.empty(1, count, dtype=torch.int64, device=device)
    kernels.draw(words, None, tuple(key.tolist()), torch.zeros(1, dtype=torch.int64, device=device))
    return words.view(-1).view(torch.uint8)


def held_by(
    scaffold: ScaffoldTensor, residency: Residency, device: torch.device | str
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Words and codes that a weight holds."""
    if residency == "int4" and fits_kernel(scaffold) and is_ternary(scaffold.family):
        if torch.device(device).type != "cpu":
            raise ValueError("residency='int4' is for CPUs. Call set_residency('packed') before moving the model.")
        return None, int4_codes(scaffold)
    return (None if residency == "streamed" else pack(scaffold, device)), None


@lru_cache(maxsize=32)
def _largest(family: str, scale: float, casts: tuple[torch.dtype, ...]) -> float:
    value = torch.tensor(get_family(family).table.max() * np.float32(scale))
    for dtype in casts:
        value = value.to(dtype)
    return value.item()


_LOCAL = threading.local()


def _buffer(size: int, dtype: torch.dtype) -> torch.Tensor:
    """Scratch of shape `(1, size)`, one per thread, so that values that are made again and again fault no new pages.

    It goes round: what was read last is in other cores' caches, and writing there would wait for each line.
    """
    size *= dtype.itemsize
    scratch, at = getattr(_LOCAL, "scratch", None), getattr(_LOCAL, "at", 0)
    if scratch is None or scratch.nbytes < size:
        scratch, at = torch.empty(max(size, SCRATCH), dtype=torch.uint8), 0
    if at + size > scratch.nbytes:
        at = 0
    _LOCAL.scratch, _LOCAL.at = scratch, -(-(at + size) // 64) * 64
    return scratch[at : at + size].view(dtype).view(1, -1)
