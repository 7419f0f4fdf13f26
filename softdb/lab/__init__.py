"""Hard against soft: what each way of reading a store gives and costs, as tables and pictures.

`compare` reads the same queries in every way asked for and sets the answers side by side; `anneal` compares the
gradients that go back through them; `explain` shows which rows one answer is made of. What they return prints itself as
a table, goes to a dictionary or a CSV file, and draws itself where matplotlib is installed (``pip install
"softdb[plot]"``).
"""

from softdb.lab.comparison import Comparison, Setting, compare
from softdb.lab.explanation import Explanation, explain
from softdb.lab.gradients import Annealing, Gradient, anneal

__all__ = ["Annealing", "Comparison", "Explanation", "Gradient", "Setting", "anneal", "compare", "explain"]
