"""Losses over device meshes: where arrays lie, and what devices exchange."""
