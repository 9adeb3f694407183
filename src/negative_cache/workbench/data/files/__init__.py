"""Rows of one file as they are: compression, encoding, JSON, tables, and names of columns."""
