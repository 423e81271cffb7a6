"""Rows in, decisions out: the bundle's own features and model, compiled for one row, with no library of training."""
