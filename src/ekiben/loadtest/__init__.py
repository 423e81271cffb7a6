"""Load on a service: how fast it answers, how many at once, and whether that is what was declared."""
