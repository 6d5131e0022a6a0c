"""Worker processes: one pool class, for the ranks of `check --tp` and for the implementations of `bench`."""
