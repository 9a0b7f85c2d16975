"""Figures of the paper that tests hold us to."""

# Parameters of its Llamas, the tied embedding once.
TOTALS = {"3M": 2_368_320, "30M": 29_990_784, "300M": 315_405_312, "600M": 693_370_944, "900M": 1_212_039_296}
