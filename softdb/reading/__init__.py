"""Reads of a table: exact, of the best rows, and with a sample of the rest."""
