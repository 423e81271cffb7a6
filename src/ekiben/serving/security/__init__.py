"""Whose files are believed and who may come in: sums, signatures, keys and certificates."""
