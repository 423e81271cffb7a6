"""Looking back at runs: find, show, compare, explain, repeat, debug."""
