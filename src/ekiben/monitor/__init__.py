"""What production looks like: windows of the journal, what moved in them, how good and how fair the answers are, and who is told."""
