"""Exact top-k and top-k reads through IVF, compared with FAISS searches alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from harness import Case, Contestant, Work, main
from torch import Tensor

import faiss

from softdb import SoftKVStore
from softdb.cli.demo import load_senses

WIDTH = 64
CENTERS, CLUSTER_STD = 20_000, 0.4
# Word senses are repeated with noise. Its norm, relative to the norm of the key.
RELATIVE_NOISE = 0.2
# Rows per tile of the product that measures the floor.
TILE_ROWS = 4096


def cases(small: bool) -> Iterator[Case]:
    """Yield exact top-k and reads through IVF, over clustered rows and word senses."""
    rows, lists = (3_000, 8) if small else (1_000_000, 2048)
    for name, keys, query in _make_clustered_rows(rows), _make_word_senses(rows // 4):
        for k, limit in ((32, 0.25), (256, 0.45)):
            for batch in (3,) if small else (64, 256):
                yield _make_exact_case(f"exact top-k, {name}", keys, query[:batch], k, limit)
        yield _make_ivf_case(f"through IVF, {name}", keys, query[:3] if small else query, lists, 32)


def _make_clustered_rows(rows: int) -> tuple[str, Tensor, Tensor]:
    """Make rows and queries around 20,000 centers."""
    torch.manual_seed(0)
    centers = torch.randn(CENTERS, WIDTH)

    def draw(count: int) -> Tensor:
        return centers[torch.randint(CENTERS, (count,))] + CLUSTER_STD * torch.randn(count, WIDTH)

    return "clustered", draw(rows), draw(256)


def _make_word_senses(rows: int) -> tuple[str, Tensor, Tensor]:
    """Make rows and queries from the word senses of the demo, with noise."""
    torch.manual_seed(0)
    senses = load_senses().keys.float()

    def draw(count: int) -> Tensor:
        keys = senses[torch.randint(len(senses), (count,))]
        noise = torch.randn_like(keys)
        scale = RELATIVE_NOISE * keys.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
        noisy: Tensor = keys + scale * noise
        return noisy

    return "word senses", draw(rows), draw(256)


def _make_exact_case(label: str, keys: Tensor, query: Tensor, k: int, limit: float) -> Case:
    store = SoftKVStore(keys.shape[1], 1, metric="dot", index="Flat")
    store.add(keys, torch.zeros(len(keys), 1))
    index = faiss.IndexFlatIP(keys.shape[1])
    index.add(keys.numpy())

    def own() -> Tensor:
        with torch.no_grad():
            ids = store.read(query, "topk", k=k).ids
        return query.new_empty(0) if ids is None else ids

    def agreement() -> dict[str, float]:
        wanted = index.search(query.numpy(), k)[1]
        same = [len(np.intersect1d(a, b)) for a, b in zip(own().numpy(), wanted, strict=True)]
        return {"same rows": sum(same) / wanted.size}

    return Case(
        f"{label} ({len(query)}, {len(keys):,}), {keys.shape[1]}, k {k}",
        softdb={"topk read": own},
        peers={"IndexFlatIP": lambda: index.search(query.numpy(), k)},
        work=_compute_work(query, keys),
        claims={("topk read", "IndexFlatIP"): limit},
        facts=agreement,
    )


def _make_ivf_case(label: str, keys: Tensor, query: Tensor, lists: int, k: int) -> Case:
    """Make a case of a top-k read; its peers are the FAISS search and an exact read."""
    store = SoftKVStore(keys.shape[1], WIDTH, trainable=True, sparse_grad=True, index=f"IVF{lists},Flat")
    store.reserve(len(keys))
    store.add(keys, torch.randn(len(keys), WIDTH))
    query = query.clone().requires_grad_()
    wanted = query.detach().numpy()
    upstream = torch.randn(len(query), WIDTH)
    store.read(query, "topk", k=k)  # Builds the index and tunes it for a recall of 0.95.
    stats = store.index_stats()
    probes = max(8, stats.nprobe or 8)
    index = faiss.index_factory(keys.shape[1], f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(keys[:: max(1, len(keys) // (64 * lists))].numpy())
    index.add(keys.numpy())
    index.nprobe = stats.nprobe

    def read() -> Tensor:
        with torch.no_grad():
            return store.read(query, "topk", k=k).values

    def read_exactly() -> Tensor:
        with torch.no_grad():
            return store.read(query).values

    def gradients() -> tuple[Tensor, ...]:
        output = store.read(query, "topk", k=k).values
        return torch.autograd.grad(output, (query, store.keys, store.values), upstream)

    contestants: dict[str, Contestant] = {"topk read": read, "with backward": gradients}
    return Case(
        f"{label} ({len(query)}, {len(keys):,}), {keys.shape[1]}/{WIDTH}, k {k}",
        softdb=contestants,
        peers={"FAISS search": partial(index.search, wanted, k), "exact read": read_exactly},
        claims={
            ("topk read", "FAISS search"): 1.10,
            ("with backward", "FAISS search"): 1.40,
            ("topk read", "exact read"): 0.05,
        },
        facts=partial(dict[str, float], {"recall": stats.recall or 0.0, "nprobe": probes}),
    )


def _compute_work(query: Tensor, keys: Tensor) -> Work:
    return Work(
        operations=2 * len(query) * keys.numel(),
        bytes=keys.nbytes,
        product=(len(query), keys.shape[1], min(TILE_ROWS, len(keys))),
    )


if __name__ == "__main__":
    main("top_k", cases)
