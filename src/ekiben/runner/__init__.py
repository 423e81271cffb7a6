"""Notebooks become jobs: graph, cache, papermill engine, accounts, MLflow."""
