"""Optimisers that update only the rows with a gradient.

They accept any Parameter; a row is an index of its first dimension. If the Parameter holds the keys or values of a
`SoftKVStore`, state follows the rows: it is reset when a slot gets a new row, and grows with the storage.
"""

from softdb.optim.adagrad import RowAdagrad
from softdb.optim.adam import RowAdam
from softdb.optim.average import update_average
from softdb.optim.clip import clip_row_grad_norm_

__all__ = ["RowAdagrad", "RowAdam", "clip_row_grad_norm_", "update_average"]
