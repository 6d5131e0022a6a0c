"""Adapters to other libraries, one file each, which import their library when they are used. No mathematics here."""
