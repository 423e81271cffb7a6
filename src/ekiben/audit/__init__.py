"""Mitigations compared on validation rows, and the decision policy frozen there."""
