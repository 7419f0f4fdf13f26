"""Kernels for CPUs: torch operations on blocks of rows."""
