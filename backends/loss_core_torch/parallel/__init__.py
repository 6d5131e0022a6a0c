"""Losses over process groups: where tensors lie, what the ranks agree on, and the collectives of a call."""
