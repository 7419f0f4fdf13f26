"""Optimisers that update only the rows that a gradient names.

Any Parameter will do; a row is an index of its first dimension. Where the Parameter holds the keys or values of a
`SoftKVStore`, state follows the rows: it is reset for a row that is new in its slot, and grows with the storage.
"""

from softdb.optim.adagrad import RowAdagrad
from softdb.optim.adam import RowAdam
from softdb.optim.average import update_average
from softdb.optim.clip import clip_row_grad_norm_

__all__ = ["RowAdagrad", "RowAdam", "clip_row_grad_norm_", "update_average"]
