"""One file per family of losses: the callable, its derivative and its reduction."""
