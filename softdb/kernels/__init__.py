"""Kernels: what reads do with tensors, by a backend for each kind of device."""
