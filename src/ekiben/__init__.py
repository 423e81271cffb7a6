"""From a notebook experiment to a service that answers."""

__version__ = "0.1.0"
