"""Optimizers that update only the rows with a gradient.

They accept any Parameter; a row is a slice along its first dimension. If the Parameter holds the keys or values of a
`SoftKVStore`, the state of a slot is reset when the slot gets a new row, and the state grows with the storage.
"""

from softdb.optim.adagrad import RowAdagrad
from softdb.optim.adam import RowAdam
from softdb.optim.average import update_average
from softdb.optim.clip import clip_row_grad_norm_
from softdb.optim.parameters import other_parameters, row_parameters

__all__ = [
    "RowAdagrad",
    "RowAdam",
    "clip_row_grad_norm_",
    "other_parameters",
    "row_parameters",
    "update_average",
]
