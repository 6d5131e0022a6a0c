"""Losses over process groups: layouts of tensors, agreement of the ranks on a call, and its collectives."""
