from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from hf_lottalora import FAMILIES, ScaffoldTensor, get_family
from hf_lottalora.families import Family
from hf_lottalora.scaffold import combined_digest, first_difference, run_starts, sampled_digest


@pytest.mark.parametrize("name", ["normal", "uniform", "binary"])
def test_tables_have_zero_mean_and_unit_variance(name: str) -> None:
    family = FAMILIES[name]
    table = family.table.astype(np.float64)
    assert table.shape == (1 << family.bits,) and family.table.dtype == np.float32
    assert abs(table.mean()) < 1e-9
    assert abs(table.var() - 1) < 1e-7  # float32 rounding of the entries
    assert np.array_equal(table, -table[::-1])
    assert not family.table.flags.writeable


def test_zero_is_zero() -> None:
    assert not get_family("zero").table.any()


def test_an_edited_table_is_refused() -> None:
    edited = Family("edited", 2, np.sin, FAMILIES["binary"].table_digest)
    with pytest.raises(RuntimeError, match="table of family 'edited' came out as"):
        _ = edited.table


def test_unknown_family_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"\['binary', 'normal', 'uniform', 'zero'\], got 'gaussian'"):
        get_family("gaussian")


BASE = ScaffoldTensor("a.weight", (128, 64), 1, "normal", 0.5)


@pytest.mark.parametrize(
    "change",
    [{"name": "b.weight"}, {"shape": (64, 128)}, {"seed": 2}, {"family": "uniform"}, {"scale": 0.51}, {"zero_row": 0}],
)
def test_digest_depends_on_everything_that_fixes_the_tensor(change: dict[str, object]) -> None:
    assert BASE.digest() == dataclasses.replace(BASE).digest()
    assert dataclasses.replace(BASE, **change).digest() != BASE.digest()


@pytest.mark.parametrize("numel", [1, 63, 64, 65, 200, 5000, 1 << 20])
def test_digest_runs_cover_both_ends(numel: int) -> None:
    starts = run_starts(numel)
    assert starts[0] == 0 and len(starts) <= 66
    assert starts[-1] + min(64, numel) == numel
    assert len(starts) == 66 or numel < 66 + 64


def test_combined_digest_depends_on_seed_and_every_tensor() -> None:
    digests = {"a": "1", "b": "2"}
    assert combined_digest(1, digests) == combined_digest(1, dict(reversed(digests.items())))
    assert len({combined_digest(1, digests), combined_digest(2, digests), combined_digest(1, {"a": "1"})}) == 3


def test_first_difference_names_the_tensor() -> None:
    assert first_difference({"a": "1"}, {"a": "1"}) is None
    assert "'b' has digest 3, the artifact says 2" in str(first_difference({"a": "1", "b": "2"}, {"a": "1", "b": "3"}))
    assert "'a' is in the artifact but not in this model" in str(first_difference({"a": "1"}, {}))
    assert "'a' is in this model but not in the artifact" in str(first_difference({}, {"a": "1"}))


def test_sampled_digest_is_the_same_in_float32_and_bfloat16() -> None:
    value = torch.randn(500, 30, generator=torch.Generator().manual_seed(0))
    assert sampled_digest(value) == sampled_digest(value.bfloat16())
    changed = value.clone()
    changed[-1, -1] += 1
    assert sampled_digest(changed) != sampled_digest(value)
