"""Error bounds: parts of derived bounds, an estimate for a loss without one, and errors of a result against a bound."""
