"""Scale rules: the standard deviation of a drawn matrix."""

from __future__ import annotations

import math

# Gain of a leaky ReLU with slope a = sqrt(5), as torch initialises nn.Linear.
_KAIMING_GAIN = math.sqrt(2 / (1 + 5))

SCALE_RULES = {
    "fan_in": "1 / sqrt(fan_in), the paper's default",
    "kaiming": "sqrt(1/3) / sqrt(fan_in): Kaiming with a = sqrt(5)",
    "xavier": "sqrt(2 / (fan_in + fan_out)), gain 1",
    "initializer_range": "the architecture's own",
    "gain": "the family fixes the size; a number multiplies it (orthogonal, spectral_radius)",
}


def scale_of(rule: str | float, fan_in: int, fan_out: int, initializer_range: float | None) -> float | None:
    """Standard deviation by a rule, or the rule itself where it is a number (fixed sigma, or a gain).

    Args:
        rule: a key of `SCALE_RULES`, or a positive number.
        fan_in: inputs per output: d_in, or input channels / groups * kernel.
        fan_out: outputs per input, likewise.
        initializer_range: the architecture's own, None for a plain `nn.Module`.

    Returns:
        None where the rule is the architecture's, and it has none.
    """
    if not isinstance(rule, str):
        return float(rule)
    if rule == "initializer_range":
        return initializer_range
    if rule == "gain":
        return 1.0
    if rule == "xavier":
        return math.sqrt(2 / (fan_in + fan_out))
    return (_KAIMING_GAIN if rule == "kaiming" else 1.0) / math.sqrt(fan_in)
