"""One file per family of losses: the callable, its derivative, and how rows are reduced."""
