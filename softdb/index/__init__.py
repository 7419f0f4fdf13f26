"""Find the candidates of top-k reads. Only this package imports FAISS."""

from softdb.index.config import IndexConfig, IndexStats
from softdb.index.manager import IndexManager
from softdb.index.search import Found

__all__ = ["Found", "IndexConfig", "IndexManager", "IndexStats"]
