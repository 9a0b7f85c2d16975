"""Scaffold format v1: every random number is a pure function of (seed, tensor name, element index).

    W[i] = scale * table[k random bits of element i]        k in {1, 2, 4, 8, 16}

Key    BLAKE2b-128 of (format version, seed, canonical name), read as two little-endian uint64.
Words  Philox4x64-10 under that key, counter starting at 0 (Random123's block b+1 is stream block b: NumPy
       increments before it generates). Bit generators are stream-stable across NumPy versions (NEP 19).
Bits   element i, in flat row-major order, owns bits [i*k, (i+1)*k) of the little-endian word stream.

Nothing else enters: no draw order, shard, device, dtype, thread count or global generator.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch

from .interrupts import uninterrupted

FORMAT_VERSION = 1
GENERATOR = "philox4x64-10"

# Words per task, 1 MiB: long enough (0.5 ms) to hide the hand-over to a thread, while words and indices stay in cache.
BLOCK_WORDS, SMALLEST_BLOCK_WORDS = 1 << 17, 1 << 15

_DTYPE_OF_ROW = {2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
_SAME_SIZE_INT = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Table:
    """The values that weights can have, as the destination holds them, and what is looked up in their place.

    Attributes:
        bits: random bits per element.
        values: shape `(2**bits,)`: one float32 multiply of the family's by the scale and one rounding to the
            destination's dtype, as integers of its size.
    """

    def __init__(self, family_table: np.ndarray[Any, Any], scale: float, dtype: torch.dtype) -> None:
        self.bits = len(family_table).bit_length() - 1
        self.values = flat_bits(torch.from_numpy(family_table * np.float32(scale)).to(dtype))

    @cached_property
    def octets(self) -> np.ndarray[Any, Any]:
        """`(256, 8 // bits)`: the values that each possible byte of the stream encodes, lowest bits first.

        With 16 bits `(65536, 1)`.
        """
        if self.bits == 16:
            return self.values[:, None]
        octet = np.arange(256)[:, None]
        rows: np.ndarray[Any, Any] = self.values[(octet >> np.arange(0, 8, self.bits)) & ((1 << self.bits) - 1)]
        return rows

    @cached_property
    def pairs(self) -> np.ndarray[Any, Any]:
        """`(65536, 16 // bits)`, for two bytes at a time: half the look-ups, where it still fits an L2 cache."""
        rows = self.octets
        if self.bits == 16 or rows.nbytes << 9 > 1 << 19:
            return rows
        pairs = np.empty((256, 256, 2, rows.shape[1]), rows.dtype)  # by high byte, low byte
        pairs[:, :, 0], pairs[:, :, 1] = rows, rows[:, None]
        return pairs.reshape(1 << 16, -1)


class Draw(NamedTuple):
    """One contiguous run of a tensor's elements to be drawn.

    Attributes:
        out: destination, 1-D array of shape `(n,)`; its dtype only needs the item size of the table's.
        table: what to look up.
        key: the tensor's Philox key, shape `(2,)`, uint64.
        start: flat index of the first element.
        words: the tensor's words from the first on, dtype '<u8', where they are in memory already; None draws them.
    """

    out: np.ndarray[Any, Any]
    table: Table
    key: np.ndarray[Any, Any]
    start: int = 0
    words: np.ndarray[Any, Any] | None = None


def check_seed(seed: object, what: str = "seed") -> int:
    """Return `seed` as an int.

    Raises:
        TypeError: not an integer (a bool is not one either).
        ValueError: outside 0 <= seed < 2**64; nothing is wrapped.
    """
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise TypeError(f"{what} must be an integer, got {seed!r} of type {type(seed).__name__}.")
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"{what} must satisfy 0 <= {what} < 2**64, got {seed}.")
    return int(seed)


def stream_key(seed: int, name: str) -> np.ndarray[Any, Any]:
    """Philox key of one named stream, shape `(2,)`, uint64. The fixed-width head makes the encoding unambiguous."""
    message = struct.pack("<IQ", FORMAT_VERSION, check_seed(seed)) + name.encode("utf-8")
    digest = hashlib.blake2b(message, digest_size=16, person=b"hf_lottalora").digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def random_words(key: np.ndarray[Any, Any], start: int, count: int) -> np.ndarray[Any, Any]:
    """Words `[start, start + count)` of the stream under `key`, shape `(count,)`, dtype '<u8'."""
    block, skip = divmod(start, 4)  # Philox4x64 makes four words per counter value
    bit_generator = np.random.Philox(key=key, counter=[block, 0, 0, 0])
    words: np.ndarray[Any, Any] = bit_generator.random_raw(skip + count)[skip:].astype("<u8", copy=False)
    return words


def scattered_elements(
    table: np.ndarray[Any, Any], bits: int, key: np.ndarray[Any, Any], starts: Sequence[int], length: int
) -> np.ndarray[Any, Any]:
    """Short runs `[start, start + length)` of a stream's elements, shape `(len(starts), length)`, in `table`'s dtype.

    For many runs of a few elements, where a `Draw` for each would mostly be overhead. `starts` are ascending.
    """
    per_word = 64 // bits
    count = length // per_word + 2
    words = np.empty((len(starts), count), np.uint64)
    generator, at = np.random.Philox(key=key), 0  # at: the generator's next block of four words
    for row, start in zip(words, starts, strict=True):
        block, skip = divmod(start // per_word, 4)
        generator.advance(block - at)  # also back: modulo 2**256
        row[:] = generator.random_raw(skip + count)[skip:]
        at = block + -(-(skip + count) // 4)
    shifts = np.arange(0, 64, bits, dtype=np.uint64)
    index = ((words[:, :, None] >> shifts) & np.uint64((1 << bits) - 1)).reshape(len(starts), -1)
    lead = np.array([start % per_word for start in starts])[:, None]
    elements: np.ndarray[Any, Any] = table[np.take_along_axis(index, lead + np.arange(length), axis=1)]
    return elements


def draw_blocks(draws: Iterable[Draw], threads: int | None = None, done: Callable[[int], None] | None = None) -> None:
    """Fill every destination, spread in cache-sized blocks over `threads` threads.

    Args:
        draws: what to fill; destinations must not overlap.
        threads: defaults to `torch.get_num_threads()`. The values do not depend on it.
        done: called, by any of the threads, with the number of elements of each block that has been drawn.
    """
    draws, threads = list(draws), threads or torch.get_num_threads()
    words = sum(len(draw.out) * draw.table.bits for draw in draws) // 64
    block_words = min(BLOCK_WORDS, max(SMALLEST_BLOCK_WORDS, -(-words // threads)))
    blocks = []
    for draw in draws:
        rows = draw.table.pairs if len(draw.out) >= 1 << 17 else draw.table.octets
        step = block_words * 64 // draw.table.bits
        for at in range(0, len(draw.out), step):
            blocks.append((draw._replace(out=draw.out[at : at + step], start=draw.start + at), rows))
    # Threads that mostly pass Python's lock to each other are slower than one.
    work = _draw_block if done is None else partial(_draw_block, done=done)
    _in_parallel(work, blocks, threads if words >= len(blocks) << 12 else 1)


def draw_words(key: np.ndarray[Any, Any], count: int, threads: int | None = None) -> np.ndarray[Any, Any]:
    """The first `count` words of the stream under `key`, shape `(count,)`, dtype '<u8', drawn in parallel."""
    words = np.empty(count, "<u8")

    def fill(start: int) -> None:
        part = words[start : start + BLOCK_WORDS]
        part[:] = random_words(key, start, len(part))

    _in_parallel(fill, [(start,) for start in range(0, count, BLOCK_WORDS)], threads or torch.get_num_threads())
    return words


def _in_parallel(work: Callable[..., None], jobs: list[tuple[Any, ...]], threads: int) -> None:
    if min(threads, len(jobs)) <= 1:
        for job in jobs:
            work(*job)
    else:
        left = iter(jobs)  # shared by the threads; a future for each job would cost more than a small block
        begun: list[None] = []
        ended: list[None] = []

        def take() -> None:
            begun.append(None)
            try:
                for job in left:
                    work(*job)
            finally:
                ended.append(None)

        def idle() -> None:
            list(left)  # nothing more for who begins later
            while len(ended) < len(begun):
                time.sleep(1e-4)

        try:
            for future in [_pool(os.getpid(), threads).submit(take) for _ in range(threads)]:
                future.result()
        except BaseException:  # the threads must end before what they fill is filled with something else
            uninterrupted(idle)
            raise


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads that stay, since layers may be drawn at every use; a forked process has none of its parent's."""
    return ThreadPoolExecutor(threads, thread_name_prefix="hf_lottalora")


def _draw_block(draw: Draw, rows: np.ndarray[Any, Any], done: Callable[[int], None] | None = None) -> None:
    out, bits, count = draw.out, draw.table.bits, len(draw.out)
    first_word, lead = divmod(draw.start, 64 // bits)
    word_count = math.ceil((lead + count) * bits / 64)
    if draw.words is None:
        words = random_words(draw.key, first_word, word_count)
    else:
        words = draw.words[first_word : first_word + word_count]
    first, skip = divmod(lead, rows.shape[1])
    index = words.view("u1" if len(rows) == 256 else "<u2")[first : math.ceil((lead + count) / rows.shape[1])]
    if skip == 0 and count % rows.shape[1] == 0:
        _look_up(rows, index, out)
    else:
        whole = np.empty(len(index) * rows.shape[1], out.dtype)
        _look_up(rows, index, whole)
        out[:] = whole[skip : skip + count]
    if done is not None:
        done(count)


def _look_up(rows: np.ndarray[Any, Any], index: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> None:
    row_dtype = _DTYPE_OF_ROW.get(rows[0].nbytes)
    if row_dtype is None or out.__array_interface__["data"][0] % rows[0].nbytes:
        # Mode "raise" would buffer the output; no index is out of range.
        np.take(rows, index, axis=0, out=out.reshape(len(index), -1), mode="clip")
        return
    # Each row as one element: torch looks these up a quarter faster than NumPy.
    source, target = (torch.from_numpy(array.reshape(-1)).view(row_dtype) for array in (rows, out))
    torch.index_select(source, 0, torch.from_numpy(index.astype(np.int32)), out=target)


def flat_bits(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """A NumPy view of a contiguous CPU tensor's storage as integers of the same size (bfloat16 has no NumPy dtype)."""
    return tensor.detach().view(-1).view(_SAME_SIZE_INT[tensor.element_size()]).numpy()
