"""How a version comes to serve: signed shares that grow while it holds, approvals, comparison of the arms, and the way back."""
