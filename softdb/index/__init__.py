"""The index: what finds the candidates of top-k reads. Only this package imports FAISS."""

from softdb.index.config import IndexConfig, IndexStats
from softdb.index.manager import Found, IndexManager

__all__ = ["Found", "IndexConfig", "IndexManager", "IndexStats"]
