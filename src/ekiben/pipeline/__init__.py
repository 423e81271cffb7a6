"""The exported cells of the pipeline notebooks: the user's own code."""
