"""Reads run records into a pandas DataFrame, and makes tables, figures and one report of it. No torch."""
