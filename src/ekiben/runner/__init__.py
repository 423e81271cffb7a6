"""Notebooks become jobs: graph, plan, schedule, papermill engine, accounts, MLflow."""
