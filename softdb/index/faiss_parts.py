"""Inspect FAISS indexes, and make parameters for their searches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import faiss

__all__ = [
    "accepts_parameters",
    "apply_transforms",
    "compute_distances",
    "find_ivf",
    "find_movable_ivf",
    "get_core_index",
    "get_search_width",
    "iterate_parts",
    "iterate_quantizers",
    "make_search_parameters",
    "set_search_width",
    "to_array",
    "to_faiss_metric",
    "to_vectors",
]

# Attributes of FAISS indexes that hold other indexes, and attributes that hold quantizers.
INNER_INDEX_NAMES = ("index", "base_index", "refine_index", "quantizer", "storage")

QUANTIZER_NAMES = ("pq", "refine_pq", "rq", "lsq", "prq", "plsq")


def to_faiss_metric(metric: str) -> int:
    """Return the FAISS constant of a metric."""
    return int(faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT)


def to_vectors(keys: Tensor, metric: str) -> Tensor:  # (n, d) -> (n, d) float32
    """Convert keys to the vectors that FAISS indexes."""
    vectors: Tensor = keys.detach().float()
    if metric == "cosine":
        vectors = F.normalize(vectors, dim=-1)
    return vectors


def to_array(rows: Tensor) -> Any:
    """Convert vectors to a contiguous NumPy array."""
    return np.ascontiguousarray(rows.cpu().numpy())


def compute_distances(left: Tensor, right: Tensor) -> Tensor:  # (n, d), (n, d) -> (n,)
    """Compute the distance between rows at the same position."""
    distance: Tensor = torch.linalg.vector_norm(left - right, dim=-1)
    return distance


def get_core_index(index: Any) -> Any:
    """Return the index that finds candidates, without transforms and refinement."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return get_core_index(index.index)
    return get_core_index(index.base_index) if isinstance(index, faiss.IndexRefine) else index


def iterate_parts(index: Any) -> Iterator[Any]:
    """Yield an index and its trainable parts: transforms and inner indexes."""
    index = faiss.downcast_index(index)
    yield index
    if isinstance(index, faiss.IndexPreTransform):
        for position in range(index.chain.size()):
            yield faiss.downcast_VectorTransform(index.chain.at(position))
    level = getattr(index, "q1", None)  # the lists of an Index2Layer
    if level is not None:
        yield level
    for name in INNER_INDEX_NAMES:
        inner = getattr(index, name, None)
        if isinstance(inner, faiss.Index):
            yield from iterate_parts(inner)


def iterate_quantizers(part: Any) -> Iterator[Any]:
    """Yield the quantizers in a part of an index, which are trained by clustering."""
    for name in QUANTIZER_NAMES:
        quantizer = getattr(part, name, None)
        if quantizer is not None:
            yield quantizer


def find_ivf(index: Any) -> Any:
    """Return the IVF index inside ``index``, or None."""
    return faiss.try_extract_index_ivf(get_core_index(index))


def accepts_parameters(index: Any, selector: Any, width: int | None) -> bool:
    """Return whether FAISS searches ``index`` with a selector or a search width.

    FAISS raises for indexes that do not support them.
    """
    parameters = make_search_parameters(index, selector, width)
    # FAISS does not support additive quantizers either, but FAISS up to 1.10 aborts the process instead of raising.
    if parameters is None or isinstance(get_core_index(index), faiss.IndexIVFAdditiveQuantizer):
        return False
    try:
        index.search(np.zeros((1, index.d), dtype=np.float32), 1, params=parameters)
    except RuntimeError:
        return False
    return True


def make_search_parameters(index: Any, selector: Any, width: int | None) -> Any:
    """Make FAISS search parameters from a selector and a search width."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        inner = make_search_parameters(index.index, selector, width)
        return None if inner is None else faiss.SearchParametersPreTransform(index_params=inner)
    if isinstance(index, faiss.IndexRefine):
        inner = make_search_parameters(index.base_index, selector, width)
        if inner is None:
            return None
        return faiss.IndexRefineSearchParameters(k_factor=index.k_factor, base_index_params=inner)
    if isinstance(index, faiss.IndexIVF):
        return faiss.SearchParametersIVF(sel=selector, nprobe=width or index.nprobe)
    if isinstance(index, faiss.IndexHNSW) and width is not None:
        return faiss.SearchParametersHNSW(efSearch=width)
    return None


def find_movable_ivf(index: Any) -> Any:
    """Return the IVF index inside ``index`` whose entries can move, or None."""
    inner = index
    if isinstance(index, faiss.IndexPreTransform):
        inner = faiss.downcast_index(index.index)
    # Other kinds store more than lists of codes, or cannot update them.
    kinds = (faiss.IndexIVFFlat, faiss.IndexIVFPQ, faiss.IndexIVFScalarQuantizer)
    return inner if type(inner) in kinds else None


def apply_transforms(index: Any, vectors: Any) -> Any:
    """Apply the transforms of ``index`` to vectors for its IVF index."""
    if isinstance(index, faiss.IndexPreTransform):
        for position in range(index.chain.size()):
            vectors = faiss.downcast_VectorTransform(index.chain.at(position)).apply(vectors)
    return np.ascontiguousarray(vectors)


def get_search_parameter(index: Any) -> tuple[Any, str, int]:
    """Return the owner, name and largest useful value of the search width."""
    core = get_core_index(index)
    if isinstance(core, faiss.IndexIVF):
        return core, "nprobe", core.nlist
    if isinstance(core, faiss.IndexHNSW):
        return core.hnsw, "efSearch", max(core.ntotal, 8)
    return None, "", 0


def get_search_width(index: Any) -> tuple[int, int]:
    """Return the search width and its largest useful value; zeros without one."""
    parameter, name, limit = get_search_parameter(index)
    return (0, 0) if parameter is None else (int(getattr(parameter, name)), int(limit))


def set_search_width(index: Any, width: int) -> None:
    """Set the search width of an index that has one."""
    parameter, name, _ = get_search_parameter(index)
    if parameter is not None:
        setattr(parameter, name, width)
