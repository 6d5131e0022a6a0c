"""Judge any implementation of a loss, clause by clause of the contract."""
