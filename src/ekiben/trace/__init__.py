"""One prediction, walked back to the cell, the commit and the data that made it."""
