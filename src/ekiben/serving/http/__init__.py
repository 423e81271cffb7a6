"""What a caller meets: addresses, guards, bodies of every kind, errors, the page and its description."""
