"""Losses over device meshes: how arrays are sharded, and the collectives."""
