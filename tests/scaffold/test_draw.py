from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from make_goldens import CASES, FILE, golden
from scipy import stats

from hf_lottalora import FAMILIES, ScaffoldTensor
from hf_lottalora.scaffold import draw
from hf_lottalora.scaffold.draw import random_words, stream_key
from hf_lottalora.scaffold.tensor import draw_into

MASK = (1 << 64) - 1


def philox4x64(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x64-10 as published (Salmon et al. 2011), in plain integers."""
    counter, key = list(counter), list(key)
    for _ in range(10):
        low, high = counter[0] * 0xD2E7470EE14C6C93, counter[2] * 0xCA5A826395121157
        counter = [
            (high >> 64) ^ counter[1] ^ key[0],
            high & MASK,
            (low >> 64) ^ counter[3] ^ key[1],
            low & MASK,
        ]
        key = [(key[0] + 0x9E3779B97F4A7C15) & MASK, (key[1] + 0xBB67AE8584CAA73B) & MASK]
    return counter


# Random123's kat_vectors: counter, key, output.
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]),
    ([MASK] * 4, [MASK] * 2, [0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0]),
    (
        [0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89],
        [0x452821E638D01377, 0xBE5466CF34E90C6C],
        [0xA528F45403E61D95, 0x38C72DBD566E9788, 0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6],
    ),
]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_known_answers(counter: list[int], key: list[int], output: list[int]) -> None:
    assert philox4x64(counter, key) == output
    before = sum(word << (64 * i) for i, word in enumerate(counter)) - 1  # NumPy increments first
    words = [(before >> (64 * i)) & MASK for i in range(4)]
    numpy_counter, numpy_key = (np.array(values, dtype=np.uint64) for values in (words, key))
    assert np.random.Philox(counter=numpy_counter, key=numpy_key).random_raw(4).tolist() == output


@given(start=st.integers(0, 1 << 40), count=st.integers(1, 9), seed=st.integers(0, MASK))
def test_words_are_philox_blocks_counted_from_one(start: int, count: int, seed: int) -> None:
    key = stream_key(seed, "some.weight")
    first = start // 4
    blocks = [philox4x64([1 + block, 0, 0, 0], key.tolist()) for block in range(first, first + 4)]
    expected = [word for block in blocks for word in block][start - 4 * first :][:count]
    assert random_words(key, start, count).tolist() == expected


@pytest.mark.parametrize("index", range(len(CASES)))
def test_golden_bytes(index: int) -> None:
    stored = json.loads(FILE.read_text())[index]
    case = CASES[index]
    assert stored.pop("case") == json.loads(json.dumps(case))
    assert golden(*case) == stored


@settings(deadline=None, max_examples=60)
@given(
    family=st.sampled_from(["normal", "uniform", "binary", "zero", "normal_8bit", "normal_4bit", "ternary"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    rows=st.integers(1, 300),
    columns=st.integers(1, 40),
    zero_row=st.none() | st.integers(0, 5),
    data=st.data(),
)
def test_a_slice_equals_that_slice_of_the_whole(
    family: str, dtype: torch.dtype, rows: int, columns: int, zero_row: int | None, data: st.DataObject
) -> None:
    zero_row = None if zero_row is None else min(zero_row, rows - 1)
    scaffold = ScaffoldTensor("a.weight", (rows, columns), 3, family, 0.5, zero_row)
    start = data.draw(st.integers(0, rows * columns))
    stop = data.draw(st.integers(start, rows * columns))
    assert torch.equal(scaffold.draw_slice(start, stop, dtype), scaffold.draw(dtype).flatten()[start:stop])


@pytest.mark.parametrize("family", ["normal", "normal_4bit", "binary"])
def test_threads_and_blocks_do_not_enter(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw, "BLOCK_WORDS", 1 << 10)
    monkeypatch.setattr(draw, "SMALLEST_BLOCK_WORDS", 1 << 8)
    block = (1 << 16) // FAMILIES[family].bits
    scaffold = ScaffoldTensor("a.weight", (5, block // 2 + 3), 3, family)
    whole = scaffold.draw(threads=1)
    assert torch.equal(whole, scaffold.draw(threads=2))
    assert torch.equal(whole, scaffold.draw(threads=7))
    at = block - 5
    assert torch.equal(scaffold.draw_slice(at, at + 10), whole.flatten()[at : at + 10])


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_every_way_to_look_up_gives_the_literal_value(bits: int, dtype: torch.dtype) -> None:
    """One byte or two at a time, rows of 2 to 64 bytes, aligned or not: table[bits of element i]."""
    family = {16: "uniform", 8: "normal_8bit", 4: "normal_4bit", 2: "normal_2bit", 1: "binary"}[bits]
    count = (1 << 17) + 24
    scaffold = ScaffoldTensor("a.weight", (count,), 5, family, 0.3)
    words = random_words(stream_key(5, "a.weight"), 0, -(-count * bits // 64))
    index = (words[:, None] >> np.arange(0, 64, bits, dtype=np.uint64)) & np.uint64((1 << bits) - 1)
    table = torch.from_numpy(FAMILIES[family].table * np.float32(0.3)).to(dtype)
    expected = table[torch.from_numpy(index.reshape(-1)[:count].astype(np.int64))]
    assert torch.equal(scaffold.draw(dtype), expected)
    misaligned = torch.zeros(count + 1, dtype=dtype)[1:]
    draw_into({scaffold: misaligned})
    assert torch.equal(misaligned, expected)
    assert torch.equal(scaffold.draw_slice(3, count - 2, dtype), expected[3 : count - 2])


@pytest.mark.parametrize("family", ["normal", "normal_8bit", "normal_4bit", "ternary", "binary"])
def test_scattered_elements_are_those_of_the_whole(family: str) -> None:
    scaffold = ScaffoldTensor("a.weight", (7000,), 3, family)
    whole = scaffold.draw().numpy()
    starts = [0, 1, 2, 63, 64, 65, 127, 1000, 1001, 3333, 6936]
    table, bits = FAMILIES[family].table, FAMILIES[family].bits
    found = draw.scattered_elements(table, bits, stream_key(3, "a.weight"), starts, 64)
    assert np.array_equal(found, np.stack([whole[start : start + 64] for start in starts]))


def test_order_and_neighbours_do_not_enter() -> None:
    specs = [ScaffoldTensor(f"layers.{i}.weight", (40, 30), 9) for i in range(4)]
    alone = {spec: spec.draw() for spec in specs}
    for order in (specs, specs[::-1], specs[1:2]):
        together = {spec: torch.empty(spec.shape) for spec in order}
        draw_into(together)
        assert all(torch.equal(together[spec], alone[spec]) for spec in order)


def test_shape_only_cuts_the_stream() -> None:
    long, short = ScaffoldTensor("a", (64, 10), 1), ScaffoldTensor("a", (10, 7), 1)
    assert torch.equal(long.draw().flatten()[:70], short.draw().flatten())


def test_a_destination_that_is_not_contiguous_gets_the_same_values() -> None:
    spec = ScaffoldTensor("a.weight", (6, 5), 1)
    strided = torch.zeros(5, 6).t()
    draw_into({spec: strided})
    assert torch.equal(strided, spec.draw())


def test_dtypes_round_the_same_float32_values_once() -> None:
    spec = ScaffoldTensor("a.weight", (100, 100), 1, scale=0.1)
    single = spec.draw()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(spec.draw(dtype), single.to(dtype))


@pytest.mark.parametrize(
    ("family", "distribution"),
    [("normal", stats.norm()), ("uniform", stats.uniform(-np.sqrt(3), 2 * np.sqrt(3)))],
)
def test_moments_and_distribution(family: str, distribution: stats.rv_continuous) -> None:
    count = 1 << 20
    values = ScaffoldTensor("a.weight", (count,), 5, family, scale=2.0).draw().double().numpy() / 2
    assert abs(values.mean()) < 4 / np.sqrt(count)
    fourth = (values**4).mean()
    assert abs(values.var() - 1) < 4 * np.sqrt((fourth - 1) / count)
    # 16-bit quantiles are at most half a step from the distribution; the rest is sampling.
    assert stats.kstest(values, distribution.cdf).statistic < 1.95 / np.sqrt(count) + 2**-16


def test_binary_is_a_fair_coin() -> None:
    values = ScaffoldTensor("a.weight", (1 << 20,), 5, "binary", scale=3.0).draw()
    assert set(values.unique().tolist()) == {-3.0, 3.0}
    assert abs(float(values.mean())) < 4 * 3 / 1024


def test_streams_of_other_names_and_seeds_are_uncorrelated() -> None:
    count = 1 << 16
    streams = [(1, "a"), (1, "b"), (2, "a"), (1, "aa"), (257, "a"), (1 << 32, "a"), (1, "a.weight")]
    draws = np.stack([ScaffoldTensor(name, (count,), seed).draw().numpy() for seed, name in streams])
    correlation = np.corrcoef(draws) - np.eye(len(streams))
    assert np.abs(correlation).max() < 5 / np.sqrt(count)
    shifted = np.corrcoef(draws[0, 1:], draws[0, :-1])[0, 1]
    assert abs(shifted) < 5 / np.sqrt(count)


@pytest.mark.parametrize("seed", [-1, 1 << 64])
def test_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=r"0 <= seed < 2\*\*64"):
        stream_key(seed, "a")


@pytest.mark.parametrize("seed", [1.0, "1", None, True])
def test_seed_of_wrong_type_is_refused(seed: object) -> None:
    with pytest.raises(TypeError, match="seed must be an integer"):
        stream_key(seed, "a")  # type: ignore[arg-type]


def test_slice_outside_the_tensor_is_refused() -> None:
    with pytest.raises(IndexError, match="which has 6 elements"):
        ScaffoldTensor("a", (2, 3), 1).draw_slice(4, 7)


def test_global_random_state_is_untouched() -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    ScaffoldTensor("a", (2, 3), 1).draw()
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
