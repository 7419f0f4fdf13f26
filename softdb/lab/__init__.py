"""Comparison of hard, top-k and soft reads of a store, as tables and plots.

`compare` reads the same queries with several modes, temperatures and normalizers, and compares the results with the
exact softmax read. `compare_gradients` compares the gradients of the queries between normalizers and temperatures.
`explain` lists the rows that an exact read blends. All results have the methods ``table`` and ``plot``; the comparisons
also have ``to_dict`` and ``to_csv``.
Plots need matplotlib: ``pip install "softdb[plot]"``.
"""

from softdb.lab.comparison import Comparison, Setting, compare
from softdb.lab.explanation import Explanation, explain
from softdb.lab.gradients import Gradient, GradientComparison, compare_gradients

__all__ = [
    "Comparison",
    "Explanation",
    "Gradient",
    "GradientComparison",
    "Setting",
    "compare",
    "compare_gradients",
    "explain",
]
