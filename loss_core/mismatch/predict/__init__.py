"""Predictions of a head's log-probabilities in a given precision and by a given formula, as intervals."""
