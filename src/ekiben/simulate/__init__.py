"""Weeks of production in minutes: traffic, late labels, what goes wrong, and the picture of what became of it."""
