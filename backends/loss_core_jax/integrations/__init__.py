"""Adapters to the conventions of other libraries, one file each. No mathematics here."""
