"""The frozen policy, once, on held-out rows: quality, value, slices, robustness, explanations, the card."""
