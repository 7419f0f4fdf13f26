"""The kernels for CPUs: blocks of rows, multiplied by torch."""
