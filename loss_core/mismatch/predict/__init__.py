"""What a head gives in a given precision and by a given formula, as intervals."""
