from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from hf_lottalora import FAMILIES, Family, ScaffoldTensor, get_family, register_family
from hf_lottalora.scaffold.scales import scale_of
from hf_lottalora.scaffold.tensor import combined_digest, first_difference, run_starts, sampled_digest

TABLES = [family for family in FAMILIES.values() if family.exact and family.name != "zero"]
PAPER = """normal truncated_normal uniform orthogonal kaiming_normal kaiming_uniform xavier_normal xavier_uniform
spectral_radius cauchy laplace student_t gaussian_mixture sparse_normal erdos_renyi beta exponential normal_16bit
normal_8bit normal_4bit normal_2bit binary"""


def test_all_families_of_the_paper_and_two_more() -> None:
    assert len(PAPER.split()) == 22
    assert FAMILIES.keys() == {*PAPER.split(), "ternary", "zero"}
    assert all(family.description for family in FAMILIES.values())


@pytest.mark.parametrize("family", TABLES, ids=lambda family: family.name)
def test_tables_have_zero_mean_and_unit_variance(family: Family) -> None:
    table = family.table.astype(np.float64)
    assert table.shape == (1 << family.bits,) and family.table.dtype == np.float32
    assert abs(table.mean()) < 1e-7
    assert abs(table.var() - 1) < 1e-7  # float32 rounding of the entries
    assert np.all(np.diff(table) >= 0)
    if family.name != "exponential":
        assert np.array_equal(table, -table[::-1])
    assert not family.table.flags.writeable


MIXTURE = [(0.9, 0.05), (0.1, 0.5)]


@pytest.mark.parametrize(
    ("name", "cdf"),
    [
        ("normal", stats.norm.cdf),
        ("truncated_normal", stats.truncnorm(-2, 2).cdf),
        ("uniform", stats.uniform(-1, 2).cdf),
        ("laplace", stats.laplace.cdf),
        ("student_t", stats.t(3).cdf),
        ("gaussian_mixture", lambda x: sum(p * stats.norm.cdf(x, scale=s) for p, s in MIXTURE)),
        ("beta", stats.beta(2, 2, loc=-0.5).cdf),
        ("exponential", stats.expon.cdf),
        ("normal_8bit", stats.norm.cdf),
        ("normal_2bit", stats.norm.cdf),
    ],
)
def test_quantiles_are_those_of_the_distribution(name: str, cdf: Any) -> None:
    family = FAMILIES[name]
    p = (np.arange(1 << family.bits) + 0.5) / (1 << family.bits)
    assert np.allclose(cdf(family.quantile(p)), p, rtol=0, atol=1e-9)


def test_special_values() -> None:
    assert not get_family("zero").table.any()
    assert (FAMILIES["sparse_normal"].table == 0).mean() == pytest.approx(0.2, abs=1e-4)
    assert (FAMILIES["erdos_renyi"].table == 0).mean() == pytest.approx(0.8, abs=1e-4)
    assert FAMILIES["ternary"].table.tolist() == [-np.float32(2**0.5), 0, 0, np.float32(2**0.5)]
    cauchy = FAMILIES["cauchy"].table
    clipped = (cauchy == cauchy.max()).mean()
    assert clipped == pytest.approx(1 - stats.cauchy.cdf(10), abs=1e-4)
    assert FAMILIES["normal_4bit"].table.size == 16 and FAMILIES["normal_8bit"].table.size == 256


def test_an_edited_table_is_refused() -> None:
    edited = dataclasses.replace(FAMILIES["normal_2bit"], quantile=np.sin)
    with pytest.raises(RuntimeError, match="table of family 'normal_2bit' came out as"):
        _ = edited.table


def test_unknown_family_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"\['beta', 'binary', .*'zero'\], got 'gaussian'.*register_family"):
        get_family("gaussian")


@pytest.fixture
def registry() -> Iterator[None]:
    before = dict(FAMILIES)
    yield
    FAMILIES.clear()
    FAMILIES.update(before)


@pytest.mark.usefixtures("registry")
def test_a_family_of_ones_own() -> None:
    family = register_family("skewed", table=[-1, -1, -1, 3])
    assert family.table.tolist() == [np.float32(v) for v in (-(3**-0.5), -(3**-0.5), -(3**-0.5), 3**0.5)]
    assert register_family("skewed", table=np.array([-1, -1, -1, 3])).table_digest == family.table_digest
    values = ScaffoldTensor("a.weight", (64, 64), 1, "skewed", 0.5).draw()
    assert set(values.unique().tolist()) == {float(np.float32(v) * np.float32(0.5)) for v in family.table}
    by_function = register_family("sine", lambda p: np.sin(p), bits=8)
    assert by_function.table.size == 256 and get_family("sine") is by_function


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "normal", "table": [-1, 1]}, "'normal' exists already with another table"),
        ({"name": "new"}, "a quantile function or a table, one of them"),
        ({"name": "new", "table": [1, 2, 3]}, r"has shape \(3,\), expected 2\*\*bits values"),
        ({"name": "new", "table": [0.0] * 8}, "would use 3 bits per weight"),
        ({"name": "new", "table": [0.0, float("nan")]}, "must return 2 finite values"),
        ({"name": "new", "quantile": lambda p: p[:3], "bits": 2}, r"must return 4 finite values, got shape \(3,\)"),
        ({"name": "new", "table": [-1, 1], "scale_rule": "fanin"}, "scale_rule must be one of"),
    ],
)
def test_families_that_cannot_be_registered(arguments: dict[str, Any], message: str) -> None:
    before = dict(FAMILIES)
    with pytest.raises(ValueError, match=message):
        register_family(**arguments)
    assert before == FAMILIES


@pytest.mark.parametrize("shape", [(12, 12), (20, 7), (7, 20), (4, 3, 2, 2)])
@pytest.mark.parametrize("family", ["orthogonal", "spectral_radius"])
def test_matrix_families(family: str, shape: tuple[int, ...]) -> None:
    spec = ScaffoldTensor("a.weight", shape, 3, family, 2.0)
    matrix = spec.draw(torch.float64).reshape(shape[0], -1) / 2
    if family == "orthogonal":
        gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
        assert torch.allclose(gram, torch.eye(min(matrix.shape), dtype=torch.float64))
    elif shape == (12, 12):
        assert torch.linalg.eigvals(matrix).abs().max() == pytest.approx(0.95)
    else:
        assert torch.linalg.svdvals(matrix).max() == pytest.approx(0.95)
    assert torch.equal(spec.draw_slice(3, 40), spec.draw().flatten()[3:40])
    assert not spec.exact and spec.digest() != dataclasses.replace(spec, family="normal").digest()


def test_matrix_families_take_stacked_experts_one_by_one() -> None:
    experts = ScaffoldTensor("experts", (3, 6, 6), 3, "orthogonal", stacked=3).draw(torch.float64)
    assert torch.allclose(experts @ experts.mT, torch.eye(6, dtype=torch.float64).expand(3, 6, 6))


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("fan_in", 0.25), ("kaiming", 0.25 / 3**0.5), ("xavier", 0.2), ("initializer_range", 0.02), (0.7, 0.7)],
)
def test_scale_rules(rule: str | float, expected: float) -> None:
    assert scale_of(rule, 16, 34, 0.02) == pytest.approx(expected)


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
