"""Reads of a table: exact, top-k, and top-k with a tail sample."""
