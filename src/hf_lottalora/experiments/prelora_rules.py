"""PreLoRA's two rules (arXiv 2509.21619): whether full training has converged, and which rank each module gets."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import mean


def family_of(path: str, patterns: Mapping[str, str]) -> str:
    """The family of a module: the name of the pattern that matches its path, else its path within its block.

    The authors' script goes by one word of the path, where an attention's output and an MLP's are both "output". Here
    two modules are of one family if their paths differ in numbers alone, those before the last number left out.

    Raises:
        ValueError: patterns of several families match.

    Example:
        >>> [family_of(f"encoder.layer.3.{name}", {}) for name in ("attention.output.dense", "output.dense")]
        ['attention.output.dense', 'output.dense']
        >>> family_of("encoder.layer.3.output.dense", {"outputs": "output.dense"})
        'outputs'
    """
    named = [name for name, pattern in patterns.items() if re.match(rf"(.*\.)?({pattern})$", path)]
    if len(named) > 1:
        raise ValueError(f"families: {path!r} matches the patterns of {named}. Make each module match one.")
    parts = path.split(".")
    numbers = [at for at, part in enumerate(parts) if part.isdigit()]
    within = parts[numbers[-1] + 1 :] if numbers else parts
    return named[0] if named else ".".join(within or ["*" if part.isdigit() else part for part in parts])


def change(before: float, after: float) -> float:
    """|after - before| / |before|; from 0 to anything else infinite, and NaN where one is no number."""
    if before == after:
        return 0.0
    return abs(after - before) / abs(before) if before else math.inf


def family_changes(
    before: Mapping[str, float], after: Mapping[str, float], families: Mapping[str, str]
) -> dict[str, float]:
    """The mean over each family's modules of the relative change of a norm.

    Example:
        >>> families = {"0.q": "q", "1.q": "q", "0.v": "v"}
        >>> family_changes({"0.q": 1, "1.q": 2, "0.v": 4}, {"0.q": 1.5, "1.q": 2.5, "0.v": 4}, families)
        {'q': 0.375, 'v': 0.0}
    """
    return {
        family: mean(change(before[path], after[path]) for path in before if families[path] == family)
        for family in dict.fromkeys(families.values())
    }


def converged(
    losses: Sequence[float], changes: Sequence[Mapping[str, float]], weight_percent: float, loss_percent: float
) -> bool:
    """Whether from each window to the next the loss changed by `loss_percent` at most, and each family by less than
    `weight_percent`.

    Args:
        losses: mean loss of each window.
        changes: of each window but the first, `family_changes` from the one before.
        weight_percent: bound for weights.
        loss_percent: bound for the loss.

    Example:
        >>> converged([2.0, 1.96, 1.93], [{"q": 0.004}, {"q": 0.003}], weight_percent=0.5, loss_percent=2.5)
        True
        >>> converged([2.0, 1.96, 1.93], [{"q": 0.006}, {"q": 0.003}], weight_percent=0.5, loss_percent=2.5)
        False
    """
    return all(100 * change(*step) <= loss_percent for step in pairwise(losses)) and all(
        100 * value < weight_percent for found in changes for value in found.values()
    )


def choose_ranks(
    before: Mapping[str, float], after: Mapping[str, float], families: Mapping[str, str], ranks: Sequence[int]
) -> dict[str, int]:
    """The rank of each module: the more its norm changed among those of its family, the larger.

    u is the relative change, scaled to 0 for the least and 1 for the most of the family; the rank is
    `ranks[ceil(u R) - 1]` of R, the smallest where u = 0. Where all of a family changed alike, as where it is one
    module, all get the smallest.

    Example:
        >>> norms = {f"{layer}.q": 1.0 for layer in range(4)}
        >>> after = {"0.q": 1.0, "1.q": 1.1, "2.q": 1.25, "3.q": 1.5}
        >>> choose_ranks(norms, after, dict.fromkeys(norms, "q"), [4, 8, 16, 32])
        {'0.q': 4, '1.q': 4, '2.q': 8, '3.q': 32}
    """
    changes = {path: change(before[path], after[path]) for path in before}
    chosen = {}
    for path, value in changes.items():
        family = [changes[other] for other in changes if families[other] == families[path]]
        low, high = min(family), max(family)
        u = (value - low) / (high - low) if high > low else 0.0
        chosen[path] = ranks[max(math.ceil(u * len(ranks)) - 1, 0)]
    return chosen
