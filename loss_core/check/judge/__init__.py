"""Anybody's implementation of a loss, judged clause by clause of the contract."""
