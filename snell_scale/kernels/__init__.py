"""Numerical operations of the package; each folder is one op and imports nothing else of the package."""
