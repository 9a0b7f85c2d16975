"""The equation: arithmetic with gradients, and the layers that apply it. Knows no plan: what a layer is, it is told."""
