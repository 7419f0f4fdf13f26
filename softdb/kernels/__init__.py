"""Kernels of reads: tensor operations, with one backend for each kind of device."""
