"""What FAISS indexes are made of, and how they are asked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import faiss

# Under which names FAISS's indexes hold others, and the quantizers of their codes.
INNER_INDEXES = ("index", "base_index", "refine_index", "quantizer", "storage")


QUANTIZERS = ("pq", "refine_pq", "rq", "lsq", "prq", "plsq")


def faiss_metric(metric: str) -> int:
    """Return FAISS's number of a metric."""
    return int(faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT)


def prepared_keys(keys: Tensor, metric: str) -> Tensor:  # (n, d) -> (n, d) float32
    """``keys`` as FAISS compares them."""
    vectors: Tensor = keys.detach().float()
    if metric == "cosine":
        vectors = F.normalize(vectors, dim=-1)
    return vectors


def array_of(rows: Tensor) -> Any:
    """``rows`` as FAISS takes them."""
    return np.ascontiguousarray(rows.cpu().numpy())


def distance_to(left: Tensor, right: Tensor) -> Tensor:  # (n, d), (n, d) -> (n,)
    """Return the distances of rows from those of the same places."""
    distance: Tensor = torch.linalg.vector_norm(left - right, dim=-1)
    return distance


def core_of(index: Any) -> Any:
    """Return the index that finds candidates, within transformations of the rows and refinements of what it finds."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return core_of(index.index)
    return core_of(index.base_index) if isinstance(index, faiss.IndexRefine) else index


def parts_of(index: Any) -> Iterator[Any]:
    """Yield an index and all within it that may be trained: transformations and other indexes."""
    index = faiss.downcast_index(index)
    yield index
    if isinstance(index, faiss.IndexPreTransform):
        for place in range(index.chain.size()):
            yield faiss.downcast_VectorTransform(index.chain.at(place))
    level = getattr(index, "q1", None)  # the lists of an Index2Layer
    if level is not None:
        yield level
    for name in INNER_INDEXES:
        inner = getattr(index, name, None)
        if isinstance(inner, faiss.Index):
            yield from parts_of(inner)


def quantizers_of(part: Any) -> Iterator[Any]:
    """Yield what turns vectors to codes in a part of an index, where that is trained by clustering."""
    for name in QUANTIZERS:
        quantizer = getattr(part, name, None)
        if quantizer is not None:
            yield quantizer


def ivf_of(index: Any) -> Any:
    """The IVF index within ``index``, or None."""
    return faiss.try_extract_index_ivf(core_of(index))


def accepts(index: Any, selector: Any, width: int | None) -> bool:
    """Whether FAISS searches ``index`` with a selector, or a width: not every kind does, and it says so by raising."""
    parameters = search_parameters(index, selector, width)
    # FAISS refuses those of additive quantizers, too, but up to 1.10 that ends the process.
    if parameters is None or isinstance(core_of(index), faiss.IndexIVFAdditiveQuantizer):
        return False
    try:
        index.search(np.zeros((1, index.d), dtype=np.float32), 1, params=parameters)
    except RuntimeError:
        return False
    return True


def search_parameters(index: Any, selector: Any, width: int | None) -> Any:
    """Return what FAISS needs to search among selected entries, so widely, at whatever depth of ``index``."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        inner = search_parameters(index.index, selector, width)
        return None if inner is None else faiss.SearchParametersPreTransform(index_params=inner)
    if isinstance(index, faiss.IndexRefine):
        inner = search_parameters(index.base_index, selector, width)
        if inner is None:
            return None
        return faiss.IndexRefineSearchParameters(k_factor=index.k_factor, base_index_params=inner)
    if isinstance(index, faiss.IndexIVF):
        return faiss.SearchParametersIVF(sel=selector, nprobe=width or index.nprobe)
    if isinstance(index, faiss.IndexHNSW) and width is not None:
        return faiss.SearchParametersHNSW(efSearch=width)
    return None


def is_movable(index: Any) -> Any:
    """The inverted file within ``index`` whose entries can be moved in place, under its own type; else None."""
    inner = index
    if isinstance(index, faiss.IndexPreTransform):
        inner = faiss.downcast_index(index.index)
    # Other kinds keep more than lists of codes, or refuse.
    kinds = (faiss.IndexIVFFlat, faiss.IndexIVFPQ, faiss.IndexIVFScalarQuantizer)
    return inner if type(inner) in kinds else None


def within_lists(index: Any, vectors: Any) -> Any:
    """``vectors`` as the inverted file within ``index`` sees them."""
    if isinstance(index, faiss.IndexPreTransform):
        for place in range(index.chain.size()):
            vectors = faiss.downcast_VectorTransform(index.chain.at(place)).apply(vectors)
    return np.ascontiguousarray(vectors)


def width_name(index: Any) -> tuple[Any, str, int]:
    """What trades time for recall: an object, its attribute, and the attribute's largest useful value."""
    core = core_of(index)
    if isinstance(core, faiss.IndexIVF):
        return core, "nprobe", core.nlist
    if isinstance(core, faiss.IndexHNSW):
        return core.hnsw, "efSearch", max(core.ntotal, 8)
    return None, "", 0
