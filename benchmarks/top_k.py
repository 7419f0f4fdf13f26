"""The best rows: exact top-k beside FAISS's exact index, and a top-k read through IVF beside FAISS's bare search."""

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
CENTRES, SPREAD = 20_000, 0.4
# Word senses are repeated until there are as many rows, each moved by this share of its length.
NOISE = 0.2
BLOCK = 4096  # rows of a tile, for the product floor


def cases(small: bool) -> Iterator[Case]:
    """Exact top-k, then the read through IVF, over clustered rows and over word senses."""
    rows, lists = (3_000, 8) if small else (1_000_000, 2048)
    for name, keys, query in _clustered(rows), _word_senses(rows // 4):
        for k, limit in ((32, 0.25), (256, 0.45)):
            for batch in (3,) if small else (64, 256):
                yield _exact(f"exact top-k, {name}", keys, query[:batch], k, limit)
        yield _through_ivf(f"through IVF, {name}", keys, query[:3] if small else query, lists, 32)


def _clustered(rows: int) -> tuple[str, Tensor, Tensor]:
    """Rows about 20,000 centres, and queries about the same."""
    torch.manual_seed(0)
    centres = torch.randn(CENTRES, WIDTH)

    def near(count: int) -> Tensor:
        return centres[torch.randint(CENTRES, (count,))] + SPREAD * torch.randn(count, WIDTH)

    return "clustered", near(rows), near(256)


def _word_senses(rows: int) -> tuple[str, Tensor, Tensor]:
    """The packaged senses, over and over with noise; queries are others of the same making."""
    torch.manual_seed(0)
    senses = load_senses().keys.float()

    def near(count: int) -> Tensor:
        chosen = senses[torch.randint(len(senses), (count,))]
        noise = torch.randn_like(chosen)
        moved: Tensor = chosen + NOISE * noise * chosen.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
        return moved

    return "word senses", near(rows), near(256)


def _exact(label: str, keys: Tensor, query: Tensor, k: int, limit: float) -> Case:
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
        work=_work(query, keys),
        claims={("topk read", "IndexFlatIP"): limit},
        facts=agreement,
    )


def _through_ivf(label: str, keys: Tensor, query: Tensor, lists: int, k: int) -> Case:
    """The whole read, candidates to blend, beside no more than the search for candidates, and beside an exact read."""
    store = SoftKVStore(keys.shape[1], WIDTH, trainable=True, index=f"IVF{lists},Flat")
    store.reserve(len(keys))
    store.add(keys, torch.randn(len(keys), WIDTH))
    query = query.clone().requires_grad_()
    wanted = query.detach().numpy()
    upstream = torch.randn(len(query), WIDTH)
    store.read(query, "topk", k=k)  # builds the index, with probes for a recall of 0.95
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
        answer = store.read(query, "topk", k=k).values
        return torch.autograd.grad(answer, (query, store.keys, store.values), upstream)

    ways: dict[str, Contestant] = {"topk read": read, "with backward": gradients}
    return Case(
        f"{label} ({len(query)}, {len(keys):,}), {keys.shape[1]}/{WIDTH}, k {k}",
        softdb=ways,
        peers={"FAISS search": partial(index.search, wanted, k), "exact read": read_exactly},
        claims={
            ("topk read", "FAISS search"): 1.10,
            ("with backward", "FAISS search"): 1.40,
            ("topk read", "exact read"): 0.05,
        },
        facts=partial(dict[str, float], {"recall": stats.recall or 0.0, "nprobe": probes}),
    )


def _work(query: Tensor, keys: Tensor) -> Work:
    return Work(
        operations=2 * len(query) * keys.numel(),
        bytes=keys.nbytes,
        product=(len(query), keys.shape[1], min(BLOCK, len(keys))),
    )


if __name__ == "__main__":
    main("top_k", cases)
