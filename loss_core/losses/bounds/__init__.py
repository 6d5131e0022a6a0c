"""Which errors rounding explains: pieces of bounds, an estimate where a loss has none, and errors set against them."""
