"""One drawn tensor: what fixes it, how to draw it (or any slice of it), and the digest that names it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from .draw import FORMAT_VERSION, Draw, Table, draw_blocks, flat_bits, scattered_elements, stream_key
from .families import Family, get_family
from .gpu import kernels_for
from .matrix_families import transformed

# The digest reads the first, the last and 64 evenly spaced runs of 64 elements: milliseconds, at any size.
_RUN, RUNS = 64, 66


@dataclass(frozen=True)
class ScaffoldTensor:
    """A tensor that is nothing but (seed, name): `W[i] = scale * table[bits of element i]`.

    Attributes:
        name: canonical name, the stream's name.
        shape: full shape, in storage order.
        seed: 0 <= seed < 2**64.
        family: name of the table.
        scale: standard deviation under any family but "zero"; rounded to float32 when drawn.
        zero_row: index of a row that is zero whatever the stream says (an embedding's padding row).
        stacked: how many matrices it holds along its leading dimensions; matters to `matrix_families` alone.
    """

    name: str
    shape: tuple[int, ...]
    seed: int
    family: str = "normal"
    scale: float = 1.0
    zero_row: int | None = None
    stacked: int = 1

    @property
    def exact(self) -> bool:
        """Whether it is the same to the bit everywhere, or to the tolerance of linear algebra."""
        return get_family(self.family).exact

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def draw(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", threads: int | None = None
    ) -> torch.Tensor:
        """The tensor, shape `self.shape`."""
        tensor = torch.empty(self.shape, dtype=dtype, device=device)
        draw_into({self: tensor}, threads)
        return tensor

    def draw_slice(self, start: int, stop: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Elements `[start, stop)` of the flattened tensor, shape `(stop - start,)`; equal to that slice of the whole.

        Raises:
            IndexError: the slice leaves the tensor.
        """
        if not 0 <= start <= stop <= self.numel:
            raise IndexError(f"slice [{start}, {stop}) of {self.name!r}, which has {self.numel} elements")
        if not self.exact:
            return self.draw(dtype).flatten()[start:stop]
        values = torch.empty(1, stop - start, dtype=dtype)
        self.fill([start], values)
        return values[0]

    def fill(self, starts: Sequence[int] | torch.Tensor, out: torch.Tensor, words: torch.Tensor | None = None) -> None:
        """Draw the run of elements from `starts[i]` on into row i of a contiguous `out`, shape `(n, length)`.

        Where `out` is: on the CPU or, with kernels for it, on a GPU. `words` are the tensor's, uint8, if they are held.
        Starts that are on a GPU are not waited for.
        """
        kernels = kernels_for(out.device)
        width = self.numel // self.shape[0]
        low, high = (0, 0) if self.zero_row is None else (self.zero_row * width, (self.zero_row + 1) * width)
        if kernels is not None:
            at = torch.as_tensor(starts, dtype=torch.int64, device=out.device)
            key = tuple(stream_key(self.seed, self.name).tolist())
            kernels.draw(out, self.table_on(out.dtype, out.device), key, at, words, (low, high))
            return
        if out.device.type != "cpu":
            values = torch.empty_like(out, device="cpu")
            self.fill(starts, values, words)
            out.copy_(values)
            return
        runs = list(zip(starts.tolist() if isinstance(starts, torch.Tensor) else starts, out, strict=True))
        draw_blocks(self._draws(runs, None if words is None else words.cpu().numpy().view("<u8")))
        for start, run in runs:
            if start < high and start + len(run) > low:
                run[max(0, low - start) : high - start] = 0

    def runs_of(self, offset: Sequence[int], shape: Sequence[int]) -> tuple[list[int], int]:
        """A rectangular part as runs of the flattened tensor: where each starts, and how long all are.

        Args:
            offset: the part's first element, one index for each dimension; or one alone, of the flattened tensor.
            shape: of the part, with as many dimensions.

        Raises:
            IndexError: the part leaves the tensor.
        """
        of = (self.numel,) if len(offset) == 1 else self.shape
        if len(offset) != len(of) or any(
            not 0 <= first <= first + size <= whole for first, size, whole in zip(offset, shape, of, strict=True)
        ):
            raise IndexError(f"part {tuple(shape)} at {tuple(offset)} of {self.name!r}, which is {self.shape}")
        at = len(shape) - 1  # the last dimension of which not all is taken
        while at > 0 and shape[at] == of[at]:
            at -= 1
        strides = [math.prod(of[dim + 1 :]) for dim in range(len(shape))]
        starts = np.full((1,), offset[at] * strides[at] if len(shape) else 0, np.int64)
        for dim in reversed(range(at)):
            starts = ((np.arange(shape[dim]) + offset[dim])[:, None] * strides[dim] + starts).reshape(-1)
        return starts.tolist(), math.prod(shape[max(at, 0) :])

    def draw_part(
        self,
        offset: Sequence[int],
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """A part, such as a rank's shard, see `runs_of`: equal to that of the whole, of which no more is drawn.

        In new memory, or in that of `out`, contiguous and of this shape, dtype and device. Families that are not
        `exact` need the whole.

        Raises:
            IndexError: the part leaves the tensor.
        """
        starts, length = self.runs_of(offset, shape)
        if not self.exact:
            index = tuple(slice(first, first + size) for first, size in zip(offset, shape, strict=True))
            whole = self.draw(dtype, device)
            values = (whole.flatten() if len(offset) == 1 else whole)[index]
            return values.contiguous() if out is None else out.copy_(values)
        out = torch.empty(tuple(shape), dtype=dtype, device=device) if out is None else out
        if out.numel():
            self.fill(starts, out.view(len(starts), length))
        return out

    def is_in(
        self, tensor: torch.Tensor, full: bool = False, runs: int = RUNS, offset: Sequence[int] | None = None
    ) -> bool:
        """Whether a tensor holds what is drawn in its dtype: looks at sampled runs, or with `full` at every element.

        With an `offset` it is the part that begins there.
        """
        if offset is not None:
            return self._part_is_in(tensor, full, runs, offset)
        if tuple(tensor.shape) != self.shape:
            return False
        if not self.exact:
            drawn = self.draw(tensor.dtype)
            tolerance = max(torch.finfo(tensor.dtype).eps, 1e-9) * float(drawn.abs().amax())
            return torch.allclose(tensor.cpu(), drawn, rtol=0, atol=tolerance)
        if full:
            return torch.equal(self.draw(tensor.dtype), tensor.cpu())
        starts = run_starts(self.numel)[:runs]
        table = _table(get_family(self.family), self.scale, tensor.dtype)
        drawn = torch.from_numpy(self._runs(table.values, starts)).view(tensor.dtype)
        at = torch.tensor(starts)[:, None] + torch.arange(drawn.shape[1])
        if self.zero_row is not None:
            drawn[at // (self.numel // self.shape[0]) == self.zero_row] = 0
        return torch.equal(drawn, tensor.detach().reshape(-1)[at.to(tensor.device)].cpu())

    def _part_is_in(self, tensor: torch.Tensor, full: bool, runs: int, offset: Sequence[int]) -> bool:
        if not tensor.numel() or not self.exact or full:
            drawn = self.draw_part(offset, tuple(tensor.shape), tensor.dtype)
            if self.exact:
                return torch.equal(drawn, tensor.cpu())
            tolerance = max(torch.finfo(tensor.dtype).eps, 1e-9) * float(self.draw(tensor.dtype).abs().amax())
            return torch.allclose(tensor.cpu(), drawn, rtol=0, atol=tolerance)
        starts, length = self.runs_of(offset, tuple(tensor.shape))
        here = np.array(run_starts(tensor.numel())[:runs])[:, None] + np.arange(min(_RUN, tensor.numel()))
        there = np.array(starts)[here // length] + here % length
        table = _table(get_family(self.family), self.scale, tensor.dtype)
        key, bits = stream_key(self.seed, self.name), get_family(self.family).bits
        drawn = torch.from_numpy(scattered_elements(table.values, bits, key, there.reshape(-1).tolist(), 1)[:, 0])
        drawn = drawn.view(tensor.dtype)
        if self.zero_row is not None:
            drawn[torch.from_numpy(there.reshape(-1)) // (self.numel // self.shape[0]) == self.zero_row] = 0
        found = tensor.detach().reshape(-1)[torch.from_numpy(here.reshape(-1)).to(tensor.device)].cpu()
        return torch.equal(drawn, found)

    def digest(self) -> str:
        """BLAKE2b-128 over name, shape, table, scale and the float32 stream values of 66 runs.

        Independent of dtype, device and residency. The padding row enters by its index. What is equal to tolerance
        only enters by the normals it is computed from.
        """
        head = repr((self.name, self.shape, get_family(self.family).identity, self.zero_row)).encode()
        state = hashlib.blake2b(head, digest_size=16)
        state.update(np.float32(self.scale).astype("<f4").tobytes())
        table = get_family(self.family).table * np.float32(self.scale)
        state.update(self._runs(table, run_starts(self.numel)).astype("<f4").tobytes())
        return state.hexdigest()

    def _runs(self, table: np.ndarray[Any, Any], starts: list[int]) -> np.ndarray[Any, Any]:
        key, bits = stream_key(self.seed, self.name), get_family(self.family).bits
        return scattered_elements(table, bits, key, starts, min(_RUN, self.numel))

    def table_on(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Its values by code, shape `(2**bits,)`, as a tensor there."""
        return _table_on(get_family(self.family), self.scale, dtype, device)

    def _draws(
        self, runs: Iterable[tuple[int, torch.Tensor]], words: np.ndarray[Any, Any] | None = None
    ) -> Iterator[Draw]:
        key = stream_key(self.seed, self.name)
        for start, run in runs:
            yield Draw(flat_bits(run), _table(get_family(self.family), self.scale, run.dtype), key, start, words)


@lru_cache(maxsize=32)
def _table_on(family: Family, scale: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(_table(family, scale, dtype).values).view(dtype).to(device)


@lru_cache(maxsize=32)
def _table(family: Family, scale: float, dtype: torch.dtype) -> Table:
    return Table(family.table, scale, dtype)


def run_starts(numel: int) -> list[int]:
    """Where the digest's runs start in a flattened tensor of `numel` elements."""
    if numel <= _RUN:
        return [0]
    return sorted({j * (numel - _RUN) // (RUNS - 1) for j in range(RUNS)})


@torch.compiler.disable  # type: ignore[untyped-decorator]  # would trace NumPy's drawing
def draw_into(
    targets: Mapping[ScaffoldTensor, torch.Tensor],
    threads: int | None = None,
    done: Callable[[int], None] | None = None,
) -> None:
    """Draw each scaffold tensor into the tensor given for it; those in CPU memory in one parallel pass.

    Others one at a time: on a GPU by a kernel, else on the CPU, to be copied. The values are the same. `done` is called
    with the number of elements that have been drawn, whenever some have, by any thread.
    """
    direct = {s: t.detach() for s, t in targets.items() if s.exact and t.device.type == "cpu" and t.is_contiguous()}
    draw_blocks((draw for scaffold, tensor in direct.items() for draw in scaffold._draws([(0, tensor)])), threads, done)
    for scaffold, tensor in direct.items():
        if scaffold.zero_row is not None:
            tensor[scaffold.zero_row] = 0
        torch.autograd.graph.increment_version(tensor)  # NumPy wrote: a backward over the old values is an error
    for scaffold, target in targets.items():
        if not scaffold.exact:
            normals = replace(scaffold, family="normal", scale=1.0).draw(torch.float64, threads=threads)
            target.detach().copy_(transformed(scaffold.family, normals, scaffold.stacked) * scaffold.scale)
        elif scaffold in direct:
            continue
        elif target.is_contiguous():
            scaffold.fill([0], target.detach().view(1, -1))
            torch.autograd.graph.increment_version(target)
        else:
            target.detach().copy_(scaffold.draw(target.dtype, target.device, threads))
        if done is not None:
            done(scaffold.numel)


def combined_digest(seed: int, digests: Mapping[str, str]) -> str:
    """One BLAKE2b-128 for a whole scaffold, from its seed and the digests of its tensors by name."""
    state = hashlib.blake2b(f"{FORMAT_VERSION} {seed}\n".encode(), digest_size=16)
    for name in sorted(digests):
        state.update(f"{name} {digests[name]}\n".encode())
    return state.hexdigest()


def sampled_digest(tensor: torch.Tensor) -> str:
    """BLAKE2b-128 of a kept tensor: shape and the digest's runs, rounded to bfloat16.

    The rounding makes a float32 checkpoint and its bfloat16 copy the same base.
    """
    state = hashlib.blake2b(repr(tuple(tensor.shape)).encode(), digest_size=16)
    flat = tensor.detach().reshape(-1)
    for start in run_starts(flat.numel()):
        run = flat[start : start + _RUN].cpu()
        run = run.to(torch.bfloat16) if run.is_floating_point() else run
        state.update(flat_bits(run.contiguous()).tobytes())
    return state.hexdigest()


def first_difference(expected: Mapping[str, str], found: Mapping[str, str]) -> str | None:
    """A sentence that names the first tensor in which two digest lists differ, or None where they agree."""
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            return f"{name!r} is in the artifact but not in this model"
        if name not in expected:
            return f"{name!r} is in this model but not in the artifact"
        if expected[name] != found[name]:
            return f"{name!r} has digest {found[name]}, the artifact says {expected[name]}"
    return None
