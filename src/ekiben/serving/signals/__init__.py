"""What a service says of itself: metrics, drift, logs and spans."""
