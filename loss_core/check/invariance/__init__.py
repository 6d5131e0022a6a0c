"""Whether a token's loss and gradient depend, in any bit, on the other tokens of a call."""
