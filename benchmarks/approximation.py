"""What a sampled tail and a tolerance cost, and how right they are; and whether the promised recall is kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from harness import Case, Work, main, without_graph
from sklearn.datasets import load_digits
from torch import Tensor

from softdb import IndexConfig, Read, SoftKVStore
from softdb.cli.demo import load_senses

WIDTH = 64
BINS = {"mass < 0.2": (0.0, 0.2), "0.2 to 0.5": (0.2, 0.5), "> 0.5": (0.5, 1.1)}
DRAWS = 10_000


class Clustered:
    """Rows about 2,000 centres, their values in part what the centre says; and queries near the centres."""

    def __init__(self, rows: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.centres = torch.randn(2000, WIDTH, generator=generator)
        place = torch.randint(2000, (rows,), generator=generator)
        self.keys = self.centres[place] + 0.5 * torch.randn(rows, WIDTH, generator=generator)
        spoken = 0.3 * self.centres @ torch.randn(WIDTH, WIDTH, generator=generator)
        self.values = spoken[place] + torch.randn(rows, WIDTH, generator=generator)
        self.generator = generator

    def store(self, **options: object) -> SoftKVStore:
        """A store of them all."""
        store = SoftKVStore(WIDTH, WIDTH, metric="dot", **options)  # type: ignore[arg-type]
        store.add(self.keys, self.values)
        return store

    def queries(self, count: int) -> Tensor:
        """Others at every call."""
        place = torch.randint(2000, (count,), generator=self.generator)
        return self.centres[place] + 0.7 * torch.randn(count, WIDTH, generator=self.generator)


def cases(small: bool) -> Iterator[Case]:
    """Real rows, then a million clustered ones."""
    yield from _real_rows(small)
    yield _unbiased(50 if small else DRAWS)
    rows, queries = (20_000, 16) if small else (1_000_000, 256)
    data = Clustered(rows)
    query = data.queries(queries)
    index = IndexConfig("IVF64,Flat") if small else "auto"
    store = data.store(index=index)
    store.read(query, "topk", k=256)
    yield _tail(store, query, (1.0, 2.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0), 256 if small else 16_384)
    for temperature in (1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 64.0):
        yield _tolerance(store, query, temperature)
    del store
    for target in (0.8, 0.9, 0.95, 0.99):
        yield _recall(data, query, target, index if isinstance(index, str) else index.factory)


def off(read: Read, exact: Read) -> Tensor:
    """The relative error of each answer."""
    size = torch.linalg.vector_norm(exact.values, dim=-1)
    error: Tensor = torch.linalg.vector_norm(read.values - exact.values, dim=-1) / size
    return error


@torch.no_grad()
def figures(store: SoftKVStore, query: Tensor, temperatures: Sequence[float], k: int, samples: int) -> dict[str, float]:
    """Errors with a tail and without, by how much the k best rows hold."""
    masses, plain, tailed, mass_error, told = [], [], [], [], []
    for temperature in temperatures:
        for part in query.split(256):
            exact = store.read(part, k=k, temperature=temperature)
            tail = store.read(part, "topk", k=k, temperature=temperature, tail_samples=samples)
            masses.append(exact.mass)
            plain.append(off(store.read(part, "topk", k=k, temperature=temperature), exact))
            tailed.append(off(tail, exact))
            mass_error.append((tail.mass - exact.mass).abs())
            told.append(tail.error)
    mass, without, with_tail = torch.cat(masses), torch.cat(plain), torch.cat(tailed)
    found = {}
    for name, (least, most) in BINS.items():
        inside = (mass >= least) & (mass < most)
        if bool(inside.any()):
            found[f"error ratio, {name}"] = float(with_tail[inside].mean() / without[inside].mean())
    found["worst ratio at a temperature"] = max(
        float(mine.mean() / others.mean()) for mine, others in zip(tailed, plain, strict=True)
    )
    found["mass error"] = float(torch.cat(mass_error).mean())
    found["covered"] = float((with_tail <= torch.cat(told) + 1e-6).double().mean())  # type: ignore[arg-type]
    return found


def _tail(store: SoftKVStore, query: Tensor, temperatures: Sequence[float], samples: int, k: int = 256) -> Case:
    def read(count: int) -> Read:
        return store.read(query, "topk", k=k, temperature=8.0, tail_samples=count)

    return Case(
        f"k = {k}, a tail of {samples:,}; {len(query)} queries, {len(store):,} rows",
        softdb={"with the tail": without_graph(lambda: read(samples))},
        peers={"without": without_graph(lambda: read(0)), "exact": without_graph(lambda: store.read(query))},
        work=Work(4.0 * samples * len(query) * WIDTH, 8.0 * samples * WIDTH, (len(query), WIDTH, 1024)),
        claims={("with the tail", "without"): 1.5},
        facts=lambda: figures(store, query, temperatures, k, samples),
    )


def _tolerance(store: SoftKVStore, query: Tensor, temperature: float, tolerance: float = 0.05) -> Case:
    @torch.no_grad()
    def facts() -> Mapping[str, float]:
        exact = store.read(query, temperature=temperature)
        read = store.read(query, "topk", tolerance=tolerance, temperature=temperature)
        error = off(read, exact)
        effective = []
        for part in query[:32].split(8):
            weights = torch.softmax(part @ store.keys[: len(store)].T / temperature, -1)
            effective.append(1 / weights.square().sum(-1))
        return {
            "effective rows": float(torch.cat(effective).median()),
            "median error": float(error.median()),
            "within": float((error <= tolerance).double().mean()),
            "covered": float((error <= read.error + 1e-6).double().mean()),  # type: ignore[operator]
            "read exactly": float((read.error == 0).double().mean()),  # type: ignore[union-attr]
        }

    def read() -> Read:
        return store.read(query, "topk", tolerance=tolerance, temperature=temperature)

    return Case(
        f"tolerance {tolerance}, temperature {temperature:g}; {len(query)} queries, {len(store):,} rows",
        softdb={"tolerance": without_graph(read)},
        peers={"exact": without_graph(lambda: store.read(query, temperature=temperature))},
        claims={("tolerance", "exact"): 1.1},
        facts=facts,
    )


def _recall(data: Clustered, query: Tensor, target: float, factory: str, k: int = 32) -> Case:
    store = data.store(index=IndexConfig(factory, recall=target))
    store.read(query, "topk", k=k)

    def facts() -> Mapping[str, float]:
        told = store.index_stats().recall
        return {
            "told": 0.0 if told is None else told,
            "of 1,024 other queries": store.audit(data.queries(1024), k).mean_recall,
            "probes": float(store.index_stats().nprobe or 0),
        }

    return Case(
        f"recall {target}, k = {k}; {len(query)} queries, {len(store):,} rows",
        softdb={"topk": without_graph(lambda: store.read(query, "topk", k=k))},
        peers={"exact": without_graph(lambda: store.read(query))},
        facts=facts,
    )


# -- real rows ---------------------------------------------------------------------------------------------------------


def _real_rows(small: bool) -> Iterator[Case]:
    """Tables of a few thousand rows, so with smaller samples, and every eighth row asks."""
    senses = load_senses()
    table = senses.keys.float()
    yield _table("senses", table, table, "cosine", (0.64, 0.32, 0.16, 0.08, 0.04, 0.02), small)
    digits = load_digits()
    pixels = torch.from_numpy(digits.data).float() / 16
    labels = torch.nn.functional.one_hot(torch.from_numpy(digits.target)).float()
    yield _table("digits", pixels, labels, "l2", (8.0, 4.0, 2.0, 1.0, 0.5, 0.25), small)


def _table(name: str, keys: Tensor, values: Tensor, metric: str, temperatures: Sequence[float], small: bool) -> Case:
    asks = torch.arange(len(keys)) % 8 == 0
    store = SoftKVStore(keys.shape[1], values.shape[1], metric=metric)  # type: ignore[arg-type]
    store.add(keys[~asks], values[~asks])
    query = keys[asks][: 16 if small else None]
    k, samples = 64, 256
    temperature = temperatures[2]

    def read(count: int) -> Read:
        return store.read(query, "topk", k=k, temperature=temperature, tail_samples=count)

    return Case(
        f"{name}: k = {k}, a tail of {samples:,}; {len(query)} queries, {len(store):,} rows",
        softdb={"with the tail": without_graph(lambda: read(samples))},
        peers={"without": without_graph(lambda: read(0)), "exact": without_graph(lambda: store.read(query))},
        facts=lambda: figures(store, query, temperatures, k, samples),
    )


def _unbiased(draws: int) -> Case:
    """How far means over draws are from the truth, in standard errors: about 1, whatever the candidates are."""
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(400, width, generator=generator, dtype=torch.float64) for width in (8, 3))
    store = SoftKVStore(8, 3, trainable=True, index=IndexConfig("IVF16,Flat", recall=0.5), dtype=torch.float64)
    store.add(keys, values)
    query = torch.randn(4, 8, generator=generator, dtype=torch.float64, requires_grad=True)

    def estimates(read: Read) -> list[Tensor]:
        normaliser = read.lse.exp()
        numerator = normaliser.unsqueeze(-1) * read.values
        gradient = torch.autograd.grad(numerator.sum(), query, retain_graph=True)[0]
        return [normaliser.detach(), numerator.detach(), gradient]

    def read() -> Read:
        return store.read(query, "topk", k=8, tail_samples=40, generator=generator)

    def facts() -> Mapping[str, float]:
        found = [torch.stack(one) for one in zip(*(estimates(read()) for _ in range(draws)), strict=True)]
        names = ("normaliser", "numerator", "its gradient")
        return {
            f"{name}, standard errors": float(
                ((one.mean(0) - truth).abs() / (one.std(0) / draws**0.5)).square().mean().sqrt()
            )
            for name, one, truth in zip(names, found, estimates(store.read(query)), strict=True)
        }

    return Case(
        f"means of {draws:,} draws of 40 of 400 rows",
        softdb={"with the tail": without_graph(read)},
        peers={"exact": without_graph(lambda: store.read(query))},
        facts=facts,
    )


if __name__ == "__main__":
    main("approximation", cases)
