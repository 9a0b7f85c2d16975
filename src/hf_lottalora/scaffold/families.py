"""Scaffold families: short tables of quantiles, normalised to zero mean and exactly unit variance.

A table holds the quantiles at (j + 1/2) / 2^k of a distribution, in float64, shifted and scaled to mean 0 and
variance 1 over its 2^k entries, then rounded to float32. A family therefore fixes only the *shape* of the
distribution; its size is the scale rule's (`scales.py`). Tables of this package are pinned by digest: a SciPy that
computes another table is refused, not used.

Two families are no tables but linear algebra on normals: see `matrix_families.py`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from scipy.special import ndtr, ndtri

from .matrix_families import TRANSFORMS
from .scales import SCALE_RULES

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Family:
    """A distribution that scaffolds are drawn from.

    Attributes:
        name: as given in `LottaLoraConfig.family`.
        bits: random bits per weight; the table has `2**bits` entries.
        quantile: maps probabilities in (0, 1), shape `(2**bits,)`, ascending, to values; any location and scale.
        table_digest: BLAKE2b-128 of the float32 table.
        description: formula and parameters, for people.
        scale_rule: the rule that `LottaLoraConfig.scale=None` means.
    """

    name: str
    bits: int
    quantile: Callable[[Array], Array]
    table_digest: str
    description: str = ""
    scale_rule: str = "fan_in"

    @property
    def exact(self) -> bool:
        """Whether its tensors are equal to the bit everywhere; otherwise to tolerance (`matrix_families.py`)."""
        return self.name not in TRANSFORMS

    @property
    def identity(self) -> str:
        """What enters a tensor's digest for the family: its table, and what is done with it."""
        return self.table_digest if self.exact else f"{self.table_digest} {self.name}"

    @property
    def table(self) -> Array:
        """Read-only float32 array of shape `(2**bits,)`.

        Raises:
            RuntimeError: the computed table is not the pinned one.
        """
        return _checked_table(self)


@cache
def _checked_table(family: Family) -> Array:
    table = _table(family.quantile, family.bits)
    found = table_digest(table)
    if found != family.table_digest:
        raise RuntimeError(
            f"The table of family {family.name!r} came out as {found}, expected {family.table_digest}. Scaffolds drawn "
            "from it would differ from everybody else's. Install the SciPy version of the project's constraints file."
        )
    return table


def _symmetric(quantile: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """The upper half of the table is the lower one mirrored: the mean is exactly zero, and zeros stay zeros."""

    def mirrored(p: Array) -> Array:
        lower = quantile(p[: len(p) // 2])
        return np.concatenate([lower, -lower[::-1]])

    return mirrored


def _normal(p: Array) -> Array:
    values: Array = ndtri(p)
    return values


@_symmetric
def _truncated_normal(p: Array) -> Array:
    return _normal(ndtr(-2.0) + p * (ndtr(2.0) - ndtr(-2.0)))


def _uniform(p: Array) -> Array:
    return 2.0 * p - 1.0


@_symmetric
def _cauchy(p: Array) -> Array:
    return np.clip(np.tan(np.pi * (p - 0.5)), -10.0, 10.0)


@_symmetric
def _laplace(p: Array) -> Array:
    return np.log(2.0 * p)  # below the median


@_symmetric
def _student_t(p: Array) -> Array:
    # 3 degrees of freedom: with t = -sqrt(3) / tan(a) the distribution function is (a - sin(2 a) / 2) / pi.
    angle = _inverse(lambda a: (a - np.sin(2 * a) / 2) / np.pi, p, 0.0, np.pi / 2)
    return -math.sqrt(3) / np.tan(angle)


@_symmetric
def _gaussian_mixture(p: Array) -> Array:
    return _inverse(lambda x: 0.9 * ndtr(x / 0.05) + 0.1 * ndtr(x / 0.5), p, -5.0, 0.0)


def _inverse(cdf: Callable[[Array], Array], p: Array, low: float, high: float) -> Array:
    """Where a rising function takes the values `p`, by bisection down to float64."""
    lower, upper = np.full_like(p, low), np.full_like(p, high)
    for _ in range(64):
        middle = (lower + upper) / 2
        below = cdf(middle) < p
        lower, upper = np.where(below, middle, lower), np.where(below, upper, middle)
    return (lower + upper) / 2


def _with_zeros(zeros: float) -> Callable[[Array], Array]:
    @_symmetric
    def quantile(p: Array) -> Array:
        outside = p / (1.0 - zeros)
        return np.where(outside < 0.5, ndtri(np.minimum(outside, 0.5)), 0.0)

    return quantile


@_symmetric
def _beta_2_2(p: Array) -> Array:
    return -np.sin(np.arcsin(1.0 - 2.0 * p) / 3)  # the root of 3 x^2 - 2 x^3 = p, shifted by 1/2


def _exponential(p: Array) -> Array:
    return -np.log1p(-p)


def _ternary(p: Array) -> Array:
    return np.sign(np.trunc(4.0 * p - 2.0))


def _binary(p: Array) -> Array:
    return np.sign(p - 0.5)


def _zero(p: Array) -> Array:
    return np.zeros_like(p)


_NORMAL, _UNIFORM = "65561716612ffbcbfd947ed80353b542", "fe6fb9a530beea0e15f63edc87f63e90"

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("normal", 16, _normal, _NORMAL, "N(0, 1)"),
        Family(
            "truncated_normal", 16, _truncated_normal, "3cc6d345722b26229091ed66fd276c43", "N(0, 1) within +-2 sigma"
        ),
        Family("uniform", 16, _uniform, _UNIFORM, "U(-a, a)"),
        Family("kaiming_normal", 16, _normal, _NORMAL, "N(0, 1)", "kaiming"),
        Family("kaiming_uniform", 16, _uniform, _UNIFORM, "U(-a, a)", "kaiming"),
        Family("xavier_normal", 16, _normal, _NORMAL, "N(0, 1)", "xavier"),
        Family("xavier_uniform", 16, _uniform, _UNIFORM, "U(-a, a)", "xavier"),
        Family("cauchy", 16, _cauchy, "2bfa094960b7020def3e5c3e7294696b", "Cauchy(0, s) clipped at +-10 s"),
        Family("laplace", 16, _laplace, "45e6fe9ddd2c2b3c6a7ee3369c815b60", "Laplace(0, b)"),
        Family("student_t", 16, _student_t, "8195886e2b1fc66c1f986e8df77c4e5f", "Student's t, 3 degrees of freedom"),
        Family(
            "gaussian_mixture",
            16,
            _gaussian_mixture,
            "022ffe0b38e7bd38011176320b868b07",
            "0.9 N(0, 0.05^2) + 0.1 N(0, 0.5^2)",
        ),
        Family(
            "sparse_normal",
            16,
            _with_zeros(0.2),
            "cf545ac66cc4de418c03621bb0a047b6",
            "N(0, 1), 20 % of the entries zero",
        ),
        Family(
            "erdos_renyi",
            16,
            _with_zeros(0.8),
            "87d543f56f39ac4941d04942217be9b2",
            "N(0, 1), 20 % of the entries not zero",
        ),
        Family("beta", 16, _beta_2_2, "20937fdd2fb3c70e5a052a1422ae2033", "Beta(2, 2), centred"),
        Family("exponential", 16, _exponential, "5d70061eb76cc222a4b24f01a5ce6589", "exponential, centred"),
        Family("normal_16bit", 16, _normal, _NORMAL, "65,536 quantiles of N(0, 1)"),
        Family("normal_8bit", 8, _normal, "21e4a6f96f9e2b26415dddca99741a7f", "256 quantiles of N(0, 1)"),
        Family("normal_4bit", 4, _normal, "db1c1c363a325248fc4a43e5226d0a3f", "16 quantiles of N(0, 1)"),
        Family("normal_2bit", 2, _normal, "d79cd600a7145f2c067dcae7eb1f3bba", "4 quantiles of N(0, 1)"),
        Family("binary", 1, _binary, "510213d572fe3494610cea33b1c792b0", "sign of N(0, 1)"),
        Family("orthogonal", 16, _normal, _NORMAL, "orthonormal rows or columns", "gain"),
        Family("spectral_radius", 16, _normal, _NORMAL, "N(0, 1) rescaled to spectral radius 0.95", "gain"),
        # Not among the paper's 22:
        Family("ternary", 2, _ternary, "616dc1d33e1ab4e5f9f4924ba89bb4f5", "-a, 0, 0, a"),
        Family("zero", 1, _zero, "c804ce198ec337e3dc762bdd1a09aece", "0: the scaffold switched off"),
    )
}


def get_family(name: str) -> Family:
    """The family called `name`.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name not in FAMILIES:
        raise ValueError(
            f"family must be one of {sorted(FAMILIES)}, got {name!r}. If it is somebody's own, run their "
            "hf_lottalora.register_family(...) first."
        )
    return FAMILIES[name]


def register_family(
    name: str,
    quantile: Callable[[Array], Array] | None = None,
    bits: int = 16,
    *,
    table: Sequence[float] | Array | None = None,
    description: str = "",
    scale_rule: str = "fan_in",
) -> Family:
    """Make a family of your own usable as `LottaLoraConfig(family=name)`.

    An artifact that uses it loads only where the same table is registered under the same name; its digests say so.

    Args:
        name: new, or one registered with the same table before.
        quantile: maps ascending probabilities, shape `(2**bits,)`, to values; the table is shifted to zero mean and
            scaled to unit variance, so only the shape matters.
        bits: random bits per weight, 1, 2, 4, 8 or 16.
        table: the values themselves instead of `quantile`, 2, 4, 16, 256 or 65,536 of them; normalised likewise.
        description: formula and parameters, for people.
        scale_rule: what `LottaLoraConfig(scale=None)` means for this family.

    Raises:
        ValueError: the name is taken by another table, the size fits no number of bits, or the values are all equal or
            not finite.

    Example:
        >>> from hf_lottalora import register_family
        >>> register_family("three_to_one", table=[-1, -1, -1, 3]).bits
        2
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"A family's name must be a string, got {name!r}.")
    if (quantile is None) == (table is None):
        raise ValueError("register_family takes a quantile function or a table, one of them.")
    if table is not None:
        values = np.array(table, dtype=np.float64)
        bits = int(values.size).bit_length() - 1
        if values.ndim != 1 or values.size != 1 << bits:
            raise ValueError(f"The table of family {name!r} has shape {values.shape}, expected 2**bits values.")

        def quantile(p: Array) -> Array:
            return values

    if bits not in (1, 2, 4, 8, 16):
        raise ValueError(f"Family {name!r} would use {bits} bits per weight, expected 1, 2, 4, 8 or 16.")
    if scale_rule not in SCALE_RULES or scale_rule == "gain":
        raise ValueError(f"scale_rule must be one of {sorted(SCALE_RULES.keys() - {'gain'})}, got {scale_rule!r}.")
    assert quantile is not None
    family = Family(name, bits, quantile, table_digest(_table(quantile, bits)), description, scale_rule)
    if not _table(quantile, bits).any():
        raise ValueError(f"All values of family {name!r} are equal, expected a distribution. For none use 'zero'.")
    known = FAMILIES.get(name)
    if known is not None and (known.bits, known.table_digest, known.scale_rule) != (
        bits,
        family.table_digest,
        scale_rule,
    ):
        raise ValueError(f"Family {name!r} exists already with another table or scale rule. Choose another name.")
    FAMILIES[name] = family
    return family


def table_digest(table: Array) -> str:
    """BLAKE2b-128 of a float32 table's little-endian bytes."""
    return hashlib.blake2b(table.astype("<f4").tobytes(), digest_size=16).hexdigest()


@cache
def _table(quantile: Callable[[Array], Array], bits: int) -> Array:
    size = 1 << bits
    values = np.asarray(quantile((np.arange(size) + 0.5) / size), dtype=np.float64)
    if values.shape != (size,) or not np.isfinite(values).all():
        raise ValueError(f"A quantile function must return {size} finite values, got shape {values.shape}.")
    # fsum is exact, so the sums do not depend on how a platform orders or vectorises them.
    values = values - math.fsum(values) / size
    deviation = math.sqrt(math.fsum(values * values) / size)
    table = (values / deviation if deviation else values).astype(np.float32)
    table.flags.writeable = False
    return table
