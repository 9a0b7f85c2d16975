"""Numbers from a seed: streams, families and scales, drawn tensors and their digests. Knows no model and no option."""
