"""Parts of a drawn tensor: equal to that part of the whole, drawn without it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_lottalora.scaffold.tensor as drawing
from hf_lottalora import ScaffoldTensor
from hf_lottalora.residency.forms import resident

FAMILIES = ["normal", "normal_4bit", "ternary", "binary", "orthogonal"]
HALF = torch.bfloat16


@st.composite
def parts(draw: Any) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """A shape, and offset and shape of a part of it: rows, columns or anything; or of a run of it, flattened."""
    shape = tuple(draw(st.lists(st.integers(1, 40), min_size=1, max_size=4)))
    if draw(st.booleans()):
        start = draw(st.integers(0, math.prod(shape)))
        return shape, (start,), (draw(st.integers(0, math.prod(shape) - start)),)
    whole = draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
    offset = tuple(0 if all_ else draw(st.integers(0, n)) for all_, n in zip(whole, shape, strict=True))
    sizes = tuple(n if all_ else draw(st.integers(0, n - at)) for all_, n, at in zip(whole, shape, offset, strict=True))
    return shape, offset, sizes


@settings(max_examples=60, deadline=None)
@given(parts(), st.sampled_from(FAMILIES), st.booleans())
def test_a_part_is_that_of_the_whole(part: Any, family: str, padded: bool) -> None:
    shape, offset, sizes = part
    if family == "orthogonal" and len(shape) < 2:
        family = "normal"
    scaffold = ScaffoldTensor("a", shape, 3, family, 0.5, zero_row=0 if padded and family != "orthogonal" else None)
    index = tuple(slice(at, at + n) for at, n in zip(offset, sizes, strict=True))
    whole = scaffold.draw(HALF)
    expected = (whole.flatten() if len(offset) == 1 else whole)[index].contiguous()
    assert torch.equal(scaffold.draw_part(offset, sizes, HALF), expected)
    for full in (False, True):
        assert scaffold.is_in(expected, full, offset=offset)
        if expected.numel():
            changed = expected.clone()
            changed.view(-1)[-1] += 1
            assert not scaffold.is_in(changed, full, offset=offset)


@pytest.mark.parametrize(
    ("offset", "sizes"), [((18,), (3,)), ((0, 0, 0), (1, 1, 1)), ((0, 3), (4, 3)), ((-1, 0), (1, 5)), ((4, 0), (1, 5))]
)
def test_a_part_that_leaves_the_tensor(offset: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    with pytest.raises(IndexError, match=r"of 'a', which is \(4, 5\)"):
        ScaffoldTensor("a", (4, 5), 3).draw_part(offset, sizes)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("casts", [[torch.float32], [HALF], [torch.float32, HALF], [HALF, torch.float32]])
def test_cutting_a_weight_that_is_not_in_memory_draws_what_is_kept(
    dim: int, casts: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As FSDP2 does: it cuts, takes a part, and copies it into memory of its own."""
    scaffold = ScaffoldTensor("a", (24, 39), 1, "normal_4bit", 0.2)
    dense, lazy = (resident(scaffold, form, casts[0]) for form in ("dense", "streamed"))
    for dtype in casts[1:]:
        dense, lazy = dense.to(dtype), lazy.to(dtype)
    drawn, places = [], []
    fill = drawing.ScaffoldTensor.fill

    def counted(self: Any, starts: Any, out: torch.Tensor, words: Any = None) -> None:
        drawn.append(out.numel())
        places.append(out.data_ptr())
        fill(self, starts, out, words)

    monkeypatch.setattr(drawing.ScaffoldTensor, "fill", counted)
    chunks = lazy.chunk(5, dim)
    assert [tuple(chunk.shape) for chunk in chunks] == [tuple(chunk.shape) for chunk in dense.chunk(5, dim)]
    padded = lazy.new_zeros(chunks[0].shape)
    assert not drawn and not padded.any() and padded.dtype == casts[-1]
    last = chunks[-1]
    padded.narrow(dim, 0, last.shape[dim]).copy_(last)
    assert sum(drawn) == math.prod(last.shape)
    in_place = dim == 0 and len(lazy.casts) == 1  # contiguous and rounded once: in no other memory
    assert (places == [padded.data_ptr()]) == in_place
    assert torch.equal(padded.narrow(dim, 0, last.shape[dim]), dense.chunk(5, dim)[-1])
