"""Search for the best model on the training rows' folds, in a given time or number of trials."""
