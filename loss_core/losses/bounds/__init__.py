"""Which errors rounding explains: pieces of bounds, an estimate for a loss without one, and the errors of a result."""
