"""Command line: one file a noun."""
