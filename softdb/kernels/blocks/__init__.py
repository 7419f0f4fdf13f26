"""Exact reads and top-k by torch operations on blocks of rows, for every device."""
