"""Kernels that start warm: a process that has the libraries is forked."""
