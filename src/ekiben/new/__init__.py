"""From a table to a whole project: what the table shows, what is decided from it, and the files."""
