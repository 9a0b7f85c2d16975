"""Triton kernels: the draw into device memory, and a product with packed weights for a few rows.

Nothing imports this before a GPU is used (`gpu.kernels_for`). In Triton's interpreter (TRITON_INTERPRET=1) it runs on
CPU tensors. Both kernels give the values of `draw`, to the bit.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl

# Rows of x that one matrix instruction takes; products of more are faster with the weight made once.
MOST_ROWS = 16

_WORDS = 64  # in the place of bits per value: the words themselves


@triton.jit
def _philox4x64(block, key_0, key_1):  # type: ignore[no-untyped-def]
    """Philox4x64-10 (Salmon et al. 2011) of the counter `(block, 0, 0, 0)`: four tensors of words."""
    word_0 = block
    word_1 = tl.zeros_like(block)
    word_2 = tl.zeros_like(block)
    word_3 = tl.zeros_like(block)
    round_key_0 = word_1 + key_0
    round_key_1 = word_1 + key_1
    multiplier_0 = tl.full(block.shape, 0xD2E7470EE14C6C93, tl.uint64)
    multiplier_1 = tl.full(block.shape, 0xCA5A826395121157, tl.uint64)
    for _ in tl.static_range(10):
        low_0 = word_0 * multiplier_0
        low_1 = word_2 * multiplier_1
        high_0 = tl.umulhi(word_0, multiplier_0)
        high_1 = tl.umulhi(word_2, multiplier_1)
        word_0 = high_1 ^ word_1 ^ round_key_0
        word_1 = low_1
        word_2 = high_0 ^ word_3 ^ round_key_1
        word_3 = low_0
        round_key_0 += tl.full(block.shape, 0x9E3779B97F4A7C15, tl.uint64)
        round_key_1 += tl.full(block.shape, 0xBB67AE8584CAA73B, tl.uint64)
    return word_0, word_1, word_2, word_3


@triton.jit(do_not_specialize=["key_0", "key_1"])  # type: ignore[untyped-decorator]
def draw_kernel(  # type: ignore[no-untyped-def]
    out,
    values,
    words,
    starts,
    key_0: tl.uint64,
    key_1: tl.uint64,
    length,
    parts,
    zero_from,
    zero_to,
    BITS: tl.constexpr,
    HELD: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Elements `[starts[i], starts[i] + length)` of a stream into row i of `out`, in `parts` parts by as many programs.

    Elements from `zero_from` up to `zero_to` are zero. BITS: of an element, or 64 for the words themselves. HELD:
    whether `words` has the stream's, or they are drawn.
    """
    PER_WORD: tl.constexpr = 64 // BITS
    run, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    start = tl.load(starts + run)
    first = start // (4 * PER_WORD) + part.to(tl.int64) * BLOCKS
    number = 4 * first + tl.arange(0, 4 * BLOCKS)
    if HELD:
        needed = number * PER_WORD < start + length
        word = tl.load(words + number, mask=needed, other=0).to(tl.uint64, bitcast=True)
    else:
        # NumPy's stream counts its blocks from one.
        word_0, word_1, word_2, word_3 = _philox4x64((first + tl.arange(0, BLOCKS) + 1).to(tl.uint64), key_0, key_1)
        word = tl.interleave(tl.interleave(word_0, word_2), tl.interleave(word_1, word_3))
    element = number[:, None] * PER_WORD + tl.arange(0, PER_WORD)[None, :] - start
    if BITS == 64:
        value = word.to(tl.int64, bitcast=True)[:, None]
    else:
        shift = (tl.arange(0, PER_WORD) * BITS).to(tl.uint64)
        code = ((word[:, None] >> shift[None, :]) & ((1 << BITS) - 1)).to(tl.int32)
        value = tl.load(values + code)
        at = element + start
        value = tl.where((at >= zero_from) & (at < zero_to), 0.0, value)
    inside = (element >= 0) & (element < length)
    tl.store(out + run.to(tl.int64) * length + element, value, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def packed_linear_kernel(  # type: ignore[no-untyped-def]
    y,
    x,
    words,
    values,
    beta,
    bias,
    hidden,
    B,
    rows,
    outputs,
    inputs,
    rank,
    scaling: tl.float32,
    BITS: tl.constexpr,
    HAS_BETA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """`beta * x W^T + scaling * hidden B^T + bias` for `OUTPUTS` columns; W lies as 32-bit halves of its words.

    RANK: columns of `hidden` rounded up, or 0 without it. WIDEN: multiply in float32.
    """
    PER_HALF: tl.constexpr = 32 // BITS
    row, column = tl.arange(0, ROWS), tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    there, halves = row[:, None] < rows, inputs // PER_HALF
    shift = tl.arange(0, PER_HALF) * BITS
    total = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for first in range(0, inputs, INPUTS):
        half = first // PER_HALF + tl.arange(0, INPUTS // PER_HALF)
        known = (column[:, None] < outputs) & (half[None, :] < halves)
        word = tl.load(words + column[:, None].to(tl.int64) * halves + half[None, :], mask=known, other=0)
        code = (word[:, :, None] >> shift[None, None, :]) & ((1 << BITS) - 1)
        weight = tl.load(values + tl.reshape(code, [OUTPUTS, INPUTS]))
        at = first + tl.arange(0, INPUTS)
        part = tl.load(x + row[:, None] * inputs + at[None, :], mask=there & (at[None, :] < inputs), other=0.0)
        if WIDEN:
            part, weight = part.to(tl.float32), weight.to(tl.float32)
        total = tl.dot(part, tl.trans(weight), total, input_precision="ieee")
    if HAS_BETA:
        total *= tl.load(beta).to(tl.float32)
    if RANK:
        at = tl.arange(0, RANK)
        left = tl.load(hidden + row[:, None] * rank + at[None, :], mask=there & (at[None, :] < rank), other=0.0)
        inside = (column[None, :] < outputs) & (at[:, None] < rank)
        right = tl.load(B + column[None, :] * rank + at[:, None], mask=inside, other=0.0).to(tl.float32)
        total += scaling * tl.dot(left.to(tl.float32), right, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + column, mask=column < outputs, other=0.0).to(tl.float32)[None, :]
    target = y + row[:, None] * outputs + column[None, :]
    tl.store(target, total.to(y.dtype.element_ty), mask=there & (column[None, :] < outputs))


def draw(
    out: torch.Tensor,
    values: torch.Tensor | None,
    key: tuple[int, int],
    starts: torch.Tensor,
    words: torch.Tensor | None = None,
    zeros: tuple[int, int] = (0, 0),
) -> None:
    """Fill row i of `out` with a stream's elements from `starts[i]` on.

    Args:
        out: contiguous, shape `(n, length)`; int64 without `values`.
        values: the table, shape `(2**bits,)`, in the dtype of `out`; None gives the words.
        key: the stream's Philox key.
        starts: int64, shape `(n,)`.
        words: the stream's from the first on, if they are in memory, as uint8.
        zeros: which elements are zero whatever the stream says, from the first up to the second.
    """
    runs, length = out.shape
    if out.numel() == 0:
        return
    bits = _WORDS if values is None else len(values).bit_length() - 1
    blocks = max(32, min(128, 16 * bits))  # Philox blocks of four words per program
    parts = triton.cdiv(length + 256 // bits - 1, blocks * 256 // bits)  # the first block may begin before the run
    held = out if words is None else words.view(torch.int64)
    table = out if values is None else values
    sizes = (length, parts, *zeros)
    with _device_of(out):
        draw_kernel[(runs * parts,)](out, table, held, starts, *key, *sizes, bits, words is not None, blocks)


def _device_of(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever its arguments say."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def packed_linear(
    x: torch.Tensor,
    words: torch.Tensor,
    values: torch.Tensor,
    outputs: int,
    beta: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
    B: torch.Tensor | None = None,
    scaling: float = 1.0,
) -> torch.Tensor:
    """`beta * x W^T + scaling * hidden B^T + bias`, shape `(rows, outputs)`, summed in float32 and rounded once.

    Args:
        x: shape `(rows, inputs)`, rows at most 16, bits * inputs a multiple of 32.
        words: of W `(outputs, inputs)`, as uint8.
        values: the table, shape `(2**bits,)`, in the dtype of x.
        outputs: rows of W.
        beta: shape `(1,)`.
        bias: shape `(outputs,)`.
        hidden: x A^T, shape `(rows, rank)`.
        B: shape `(outputs, rank)`.
        scaling: of the low-rank part.
    """
    rows, inputs = x.shape
    y = x.new_empty(rows, outputs)
    bits = len(values).bit_length() - 1
    rank = 0 if hidden is None else hidden.shape[1]
    block = 16 if outputs <= 4096 else 32
    with _device_of(x):
        packed_linear_kernel[(triton.cdiv(outputs, block),)](
            y,
            x.contiguous(),
            words.view(torch.int32),
            values,
            x if beta is None else beta,
            x if bias is None else bias,
            x if hidden is None else hidden.contiguous(),
            x if B is None else B.contiguous(),
            rows,
            outputs,
            inputs,
            rank,
            scaling,
            BITS=bits,
            HAS_BETA=beta is not None,
            HAS_BIAS=bias is not None,
            RANK=0 if rank == 0 else max(16, triton.next_power_of_2(rank)),
            ROWS=MOST_ROWS,
            OUTPUTS=block,
            INPUTS=128,
            WIDEN=x.device.type == "cpu",  # the interpreter multiplies bfloat16 as if they were integers
        )
    return y
