"""Worker processes: one pool, for the ranks of `check --tp` and for the implementations of `bench`."""
