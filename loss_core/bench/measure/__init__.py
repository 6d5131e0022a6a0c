"""Measurement of one call on every implementation: inputs, roofline, accuracy, worker processes and rounds."""
