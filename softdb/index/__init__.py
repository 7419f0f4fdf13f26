"""Find candidates for top-k reads.

No other package imports FAISS.
"""

from softdb.index.config import IndexConfig, IndexStats
from softdb.index.manager import IndexManager
from softdb.index.search import Candidates

__all__ = ["Candidates", "IndexConfig", "IndexManager", "IndexStats"]
