"""How one call is measured on every implementation: its inputs, least work and accuracy; processes and rounds."""
