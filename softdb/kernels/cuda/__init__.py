"""Kernels in Triton for CUDA devices.

`softdb.kernels.backend` loads the modules of this package, and with them Triton, when the first CUDA tensor is read.
"""
