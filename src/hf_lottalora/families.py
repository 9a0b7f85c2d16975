"""Scaffold families: short tables of quantiles, normalised to zero mean and exactly unit variance.

A table holds the quantiles at (j + 1/2) / 2^k of a distribution, in float64, shifted and scaled to mean 0 and
variance 1 over its 2^k entries, then rounded to float32. Under the fan-in rule a family therefore fixes only the
*shape* of the distribution. Tables are pinned by digest: a SciPy that computes another table is refused, not used.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from scipy.special import ndtri


@dataclass(frozen=True)
class Family:
    """A distribution that scaffolds are drawn from.

    Attributes:
        name: as given in `LottaLoraConfig.family`.
        bits: random bits per weight; the table has `2**bits` entries.
        quantile: maps probabilities in (0, 1), shape `(2**bits,)`, to values; any location and scale.
        table_digest: BLAKE2b-128 of the float32 table.
    """

    name: str
    bits: int
    quantile: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]
    table_digest: str

    @property
    def table(self) -> np.ndarray[Any, Any]:
        """Read-only float32 array of shape `(2**bits,)`.

        Raises:
            RuntimeError: the computed table is not the pinned one.
        """
        return _table(self)


def _normal(p: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    values: np.ndarray[Any, Any] = ndtri(p)
    return values


def _uniform(p: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return 2.0 * p - 1.0


def _binary(p: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.sign(p - 0.5)


def _zero(p: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.zeros_like(p)


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("normal", 16, _normal, "65561716612ffbcbfd947ed80353b542"),
        Family("uniform", 16, _uniform, "fe6fb9a530beea0e15f63edc87f63e90"),
        Family("binary", 1, _binary, "510213d572fe3494610cea33b1c792b0"),
        # Not one of the paper's 22: the scaffold switched off, the control of paper section 3, finding 5.
        Family("zero", 1, _zero, "c804ce198ec337e3dc762bdd1a09aece"),
    )
}


def get_family(name: str) -> Family:
    """The family called `name`.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name not in FAMILIES:
        raise ValueError(f"family must be one of {sorted(FAMILIES)}, got {name!r}.")
    return FAMILIES[name]


def table_digest(table: np.ndarray[Any, Any]) -> str:
    """BLAKE2b-128 of a float32 table's little-endian bytes."""
    return hashlib.blake2b(table.astype("<f4").tobytes(), digest_size=16).hexdigest()


@cache
def _table(family: Family) -> np.ndarray[Any, Any]:
    size = 1 << family.bits
    values = family.quantile((np.arange(size) + 0.5) / size)
    # fsum is exact, so the sums do not depend on how a platform orders or vectorises them.
    values = values - math.fsum(values) / size
    deviation = math.sqrt(math.fsum(values * values) / size)
    table = (values / deviation if deviation else values).astype(np.float32)
    found = table_digest(table)
    if found != family.table_digest:
        raise RuntimeError(
            f"The table of family {family.name!r} came out as {found}, expected {family.table_digest}. Scaffolds drawn "
            "from it would differ from everybody else's. Install the SciPy version of the project's constraints file."
        )
    table.flags.writeable = False
    return table
