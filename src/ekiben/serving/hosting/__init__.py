"""Several versions in one process: who answers, who shadows, who is judged, and how one follows the other."""
