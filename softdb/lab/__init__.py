"""Comparison of hard, top-k and soft reads of a store, as tables and plots.

`compare` reads the same queries with several modes, temperatures and normalizers, and compares the results with the
exact softmax read. `compare_gradients` compares the gradients of the queries between normalizers and temperatures.
`explain` lists the rows that an exact read or a head of a layer blends. `summarize_usage` shows how often reads use
each row. All results have the methods ``table`` and ``plot``; the comparisons and the usage also have ``to_dict`` and
``to_csv``. Plots need matplotlib: ``pip install "softdb[plot]"``.
"""

from softdb.lab.comparison import Comparison, Setting, compare
from softdb.lab.explanation import Explanation, explain
from softdb.lab.gradients import Gradient, GradientComparison, compare_gradients
from softdb.lab.usage import UsageSummary, summarize_usage

__all__ = [
    "Comparison",
    "Explanation",
    "Gradient",
    "GradientComparison",
    "Setting",
    "UsageSummary",
    "compare",
    "compare_gradients",
    "explain",
    "summarize_usage",
]
