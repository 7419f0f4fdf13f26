"""Take FAISS indexes apart, and make the parameters of their searches."""

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
    "core_of",
    "distance_to",
    "faiss_metric",
    "get_search_width",
    "ivf_of",
    "make_search_parameters",
    "movable_ivf_of",
    "parts_of",
    "quantizers_of",
    "set_search_width",
    "to_array",
    "to_vectors",
]

# Attributes under which FAISS's indexes hold other indexes, and the quantizers of their codes.
INNER_INDEX_NAMES = ("index", "base_index", "refine_index", "quantizer", "storage")

QUANTIZER_NAMES = ("pq", "refine_pq", "rq", "lsq", "prq", "plsq")


def faiss_metric(metric: str) -> int:
    """Return FAISS's number of a metric."""
    return int(faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT)


def to_vectors(keys: Tensor, metric: str) -> Tensor:  # (n, d) -> (n, d) float32
    """Convert keys to the vectors that FAISS compares."""
    vectors: Tensor = keys.detach().float()
    if metric == "cosine":
        vectors = F.normalize(vectors, dim=-1)
    return vectors


def to_array(rows: Tensor) -> Any:
    """Convert vectors to the numpy array that FAISS takes."""
    return np.ascontiguousarray(rows.cpu().numpy())


def distance_to(left: Tensor, right: Tensor) -> Tensor:  # (n, d), (n, d) -> (n,)
    """Compute the distance of each row from the row at the same position."""
    distance: Tensor = torch.linalg.vector_norm(left - right, dim=-1)
    return distance


def core_of(index: Any) -> Any:
    """Return the index that finds candidates, inside transformations and refinements."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return core_of(index.index)
    return core_of(index.base_index) if isinstance(index, faiss.IndexRefine) else index


def parts_of(index: Any) -> Iterator[Any]:
    """Yield an index and each trainable part of it: transformations and inner indexes."""
    index = faiss.downcast_index(index)
    yield index
    if isinstance(index, faiss.IndexPreTransform):
        for place in range(index.chain.size()):
            yield faiss.downcast_VectorTransform(index.chain.at(place))
    level = getattr(index, "q1", None)  # the lists of an Index2Layer
    if level is not None:
        yield level
    for name in INNER_INDEX_NAMES:
        inner = getattr(index, name, None)
        if isinstance(inner, faiss.Index):
            yield from parts_of(inner)


def quantizers_of(part: Any) -> Iterator[Any]:
    """Yield the quantizers of an index's part that are trained by clustering."""
    for name in QUANTIZER_NAMES:
        quantizer = getattr(part, name, None)
        if quantizer is not None:
            yield quantizer


def ivf_of(index: Any) -> Any:
    """Return the IVF index inside ``index``, or None."""
    return faiss.try_extract_index_ivf(core_of(index))


def accepts_parameters(index: Any, selector: Any, width: int | None) -> bool:
    """Test whether FAISS searches ``index`` with a selector or a search width.

    Not every kind does: FAISS raises where it does not.
    """
    parameters = make_search_parameters(index, selector, width)
    # FAISS refuses those of additive quantizers, too, but up to 1.10 that ends the process.
    if parameters is None or isinstance(core_of(index), faiss.IndexIVFAdditiveQuantizer):
        return False
    try:
        index.search(np.zeros((1, index.d), dtype=np.float32), 1, params=parameters)
    except RuntimeError:
        return False
    return True


def make_search_parameters(index: Any, selector: Any, width: int | None) -> Any:
    """Make FAISS's parameters for a search of selected entries with a search width."""
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


def movable_ivf_of(index: Any) -> Any:
    """Return the inverted file inside ``index`` whose entries can move, or None."""
    inner = index
    if isinstance(index, faiss.IndexPreTransform):
        inner = faiss.downcast_index(index.index)
    # Other kinds keep more than lists of codes, or refuse.
    kinds = (faiss.IndexIVFFlat, faiss.IndexIVFPQ, faiss.IndexIVFScalarQuantizer)
    return inner if type(inner) in kinds else None


def apply_transforms(index: Any, vectors: Any) -> Any:
    """Transform vectors as ``index`` does before they reach its inverted file."""
    if isinstance(index, faiss.IndexPreTransform):
        for place in range(index.chain.size()):
            vectors = faiss.downcast_VectorTransform(index.chain.at(place)).apply(vectors)
    return np.ascontiguousarray(vectors)


def search_parameter(index: Any) -> tuple[Any, str, int]:
    """Return the owner, name and largest useful value of the search width."""
    core = core_of(index)
    if isinstance(core, faiss.IndexIVF):
        return core, "nprobe", core.nlist
    if isinstance(core, faiss.IndexHNSW):
        return core.hnsw, "efSearch", max(core.ntotal, 8)
    return None, "", 0


def get_search_width(index: Any) -> tuple[int, int]:
    """Return the search width and its largest useful value; zeros without one."""
    parameter, name, limit = search_parameter(index)
    return (0, 0) if parameter is None else (int(getattr(parameter, name)), int(limit))


def set_search_width(index: Any, width: int) -> None:
    """Set the search width of an index that has one."""
    parameter, name, _ = search_parameter(index)
    if parameter is not None:
        setattr(parameter, name, width)
