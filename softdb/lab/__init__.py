"""Comparison of hard, top-k and soft reads of a store, as tables and plots.

`compare` reads the same queries with several modes, temperatures and normalizers, and compares the results with the
exact soft read. `compare_gradients` compares the gradients of the queries. `explain` lists the rows that an answer is
made of. The results convert to a text table, a dictionary or a CSV file, and plot themselves if matplotlib is installed
(``pip install "softdb[plot]"``).
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
