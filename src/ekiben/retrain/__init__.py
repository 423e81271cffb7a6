"""New rows become a challenger that is held against the champion on the latest of them."""
