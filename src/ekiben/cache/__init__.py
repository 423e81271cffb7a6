"""What a step's result depends on, where it is kept, and when it still stands."""
