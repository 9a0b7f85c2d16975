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
import struct
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch

FORMAT_VERSION = 1
GENERATOR = "philox4x64-10"

# Elements per task: its words, indices and values together stay inside a common L2 cache, and a task is long
# enough (~0.2 ms) to hide the hand-over to a thread.
BLOCK = 1 << 18

_SAME_SIZE_INT = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Draw(NamedTuple):
    """One contiguous run of a tensor's elements to be drawn.

    Attributes:
        out: destination, 1-D array of shape `(n,)`; its dtype only needs the item size of `table`'s.
        table: values in the destination's dtype, shape `(2**bits,)`, already multiplied by the scale.
        bits: random bits per element.
        key: the tensor's Philox key, shape `(2,)`, uint64.
        start: flat index of the first element.
    """

    out: np.ndarray[Any, Any]
    table: np.ndarray[Any, Any]
    bits: int
    key: np.ndarray[Any, Any]
    start: int = 0


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


def draw_blocks(draws: Iterable[Draw], threads: int | None = None) -> None:
    """Fill every destination, spread in cache-sized blocks over `threads` threads.

    Args:
        draws: what to fill; destinations must not overlap.
        threads: defaults to `torch.get_num_threads()`. The values do not depend on it.
    """
    blocks = [
        draw._replace(out=draw.out[at : at + BLOCK], start=draw.start + at)
        for draw in draws
        for at in range(0, len(draw.out), BLOCK)
    ]
    threads = min(threads or torch.get_num_threads(), len(blocks))
    if threads <= 1:
        for block in blocks:
            _draw_block(block)
        return
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(_draw_block, blocks):
            pass


def _draw_block(draw: Draw) -> None:
    out, table, bits, key, start = draw
    per_word = 64 // bits
    first_word, lead = divmod(start, per_word)
    count = len(out)
    words = random_words(key, first_word, math.ceil((lead + count) / per_word))
    if bits >= 8:
        index = words.view(f"<u{bits // 8}")[lead : lead + count]
        np.take(table, index, out=out, mode="clip")  # "raise" would buffer the output; no index is out of range
        return
    # Fewer than eight bits: one byte of the stream looks up a row of 8 / bits values.
    per_byte = 8 // bits
    rows = _byte_rows(table, bits)
    octets = words.view("u1")
    if lead % per_byte == 0 and count % per_byte == 0:
        octets = octets[lead // per_byte : (lead + count) // per_byte]
        np.take(rows, octets, axis=0, out=out.reshape(-1, per_byte), mode="clip")
    else:
        out[:] = rows[octets].reshape(-1)[lead : lead + count]


def _byte_rows(table: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    """`(256, 8 // bits)`: the values that each possible byte encodes, lowest bits first."""
    octet = np.arange(256)[:, None]
    shift = np.arange(0, 8, bits)[None, :]
    rows: np.ndarray[Any, Any] = table[(octet >> shift) & ((1 << bits) - 1)]
    return rows


def flat_bits(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """A NumPy view of a contiguous CPU tensor's storage as integers of the same size (bfloat16 has no NumPy dtype)."""
    return tensor.detach().view(-1).view(_SAME_SIZE_INT[tensor.element_size()]).numpy()


def scaled_table(table: np.ndarray[Any, Any], scale: float, dtype: torch.dtype) -> np.ndarray[Any, Any]:
    """The table as the destination holds it: one float32 multiply, one rounding to `dtype`; as same-size integers."""
    values = torch.from_numpy(table * np.float32(scale)).to(dtype)
    return flat_bits(values)
