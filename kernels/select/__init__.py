"""select: the best scored tokens of every head, ascending, ties to the lower index."""
