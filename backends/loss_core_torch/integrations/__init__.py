"""Adapters to other libraries, one file each; each imports its library when it is used. No mathematics here."""
