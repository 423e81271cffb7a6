"""What a model is, what it was made of and who answers for it, in one folder for people outside."""
