"""Cost and accuracy of a sampled tail and of `tolerance`; recall and its target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from harness import Case, Work, main, wrap_no_grad
from sklearn.datasets import load_digits
from torch import Tensor

from softdb import IndexConfig, Read, SoftKVStore
from softdb.cli.demo import load_senses

WIDTH = 64
# Ranges of the softmax mass of the k best rows.
MASS_BINS = {"mass < 0.2": (0.0, 0.2), "0.2 to 0.5": (0.2, 0.5), "> 0.5": (0.5, 1.1)}
UNBIASED_DRAWS = 10_000


class ClusteredData:
    """Rows and queries around 2,000 centers, whose values depend on the center."""

    def __init__(self, rows: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.centers = torch.randn(2000, WIDTH, generator=generator)
        center = torch.randint(2000, (rows,), generator=generator)
        self.keys = self.centers[center] + 0.5 * torch.randn(rows, WIDTH, generator=generator)
        center_values = 0.3 * self.centers @ torch.randn(WIDTH, WIDTH, generator=generator)
        self.values = center_values[center] + torch.randn(rows, WIDTH, generator=generator)
        self.generator = generator

    def make_store(self, **options: object) -> SoftKVStore:
        """Make a store of all rows."""
        store = SoftKVStore(WIDTH, WIDTH, metric="dot", **options)  # type: ignore[arg-type]
        store.add(self.keys, self.values)
        return store

    def draw_queries(self, count: int) -> Tensor:
        """Draw new queries."""
        center = torch.randint(2000, (count,), generator=self.generator)
        return self.centers[center] + 0.7 * torch.randn(count, WIDTH, generator=self.generator)


def cases(small: bool) -> Iterator[Case]:
    """Yield cases of real rows, then of a million clustered rows."""
    yield from _make_real_cases(small)
    yield _make_unbiased_case(10 if small else UNBIASED_DRAWS)
    rows, queries = (8_000, 16) if small else (1_000_000, 256)
    data = ClusteredData(rows)
    query = data.draw_queries(queries)
    index = IndexConfig("IVF64,Flat") if small else "auto"
    store = data.make_store(index=index)
    store.read(query, "topk", k=256)
    temperatures = (1.0, 8.0) if small else (1.0, 2.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0)
    yield _make_tail_case(store, query, temperatures, 256 if small else 16_384)
    for temperature in (2.0, 64.0) if small else (1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 64.0):
        yield _make_tolerance_case(store, query, temperature)
    del store
    for target in (0.9,) if small else (0.8, 0.9, 0.95, 0.99):
        yield _make_recall_case(data, query, target, index if isinstance(index, str) else index.factory)


def compute_relative_error(read: Read, exact: Read) -> Tensor:
    """Compute the relative error of the values of each query."""
    size = torch.linalg.vector_norm(exact.values, dim=-1)
    error: Tensor = torch.linalg.vector_norm(read.values - exact.values, dim=-1) / size
    return error


@torch.no_grad()
def measure_tail_errors(
    store: SoftKVStore, query: Tensor, temperatures: Sequence[float], k: int, samples: int
) -> dict[str, float]:
    """Measure errors with and without a tail, by the softmax mass of the k best rows."""
    masses, plain, tailed, mass_error, estimates = [], [], [], [], []
    for temperature in temperatures:
        for part in query.split(256):
            exact = store.read(part, k=k, temperature=temperature)
            tail = store.read(part, "topk", k=k, temperature=temperature, tail_samples=samples)
            masses.append(exact.mass)
            plain.append(compute_relative_error(store.read(part, "topk", k=k, temperature=temperature), exact))
            tailed.append(compute_relative_error(tail, exact))
            mass_error.append((tail.mass - exact.mass).abs())
            estimates.append(tail.error)
    mass, without, with_tail = torch.cat(masses), torch.cat(plain), torch.cat(tailed)
    facts = {}
    for name, (low, high) in MASS_BINS.items():
        in_bin = (mass >= low) & (mass < high)
        if bool(in_bin.any()):
            facts[f"error ratio, {name}"] = float(with_tail[in_bin].mean() / without[in_bin].mean())
    facts["worst ratio at a temperature"] = max(
        float(mine.mean() / others.mean()) for mine, others in zip(tailed, plain, strict=True)
    )
    facts["mass error"] = float(torch.cat(mass_error).mean())
    facts["covered"] = float((with_tail <= torch.cat(estimates) + 1e-6).double().mean())  # type: ignore[arg-type]
    return facts


def _make_tail_case(
    store: SoftKVStore, query: Tensor, temperatures: Sequence[float], samples: int, k: int = 256
) -> Case:
    def read(count: int) -> Read:
        return store.read(query, "topk", k=k, temperature=8.0, tail_samples=count)

    return Case(
        f"k = {k}, a tail of {samples:,}; {len(query)} queries, {len(store):,} rows",
        softdb={"with the tail": wrap_no_grad(lambda: read(samples))},
        peers={"without": wrap_no_grad(lambda: read(0)), "exact": wrap_no_grad(lambda: store.read(query))},
        work=Work(4.0 * samples * len(query) * WIDTH, 8.0 * samples * WIDTH, (len(query), WIDTH, 1024)),
        claims={("with the tail", "without"): 1.5},
        facts=lambda: measure_tail_errors(store, query, temperatures, k, samples),
    )


def _make_tolerance_case(store: SoftKVStore, query: Tensor, temperature: float, tolerance: float = 0.05) -> Case:
    @torch.no_grad()
    def facts() -> Mapping[str, float]:
        exact = store.read(query, temperature=temperature)
        read = store.read(query, "topk", tolerance=tolerance, temperature=temperature)
        error = compute_relative_error(read, exact)
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
        softdb={"tolerance": wrap_no_grad(read)},
        peers={"exact": wrap_no_grad(lambda: store.read(query, temperature=temperature))},
        claims={("tolerance", "exact"): 1.1},
        facts=facts,
    )


def _make_recall_case(data: ClusteredData, query: Tensor, target: float, factory: str, k: int = 32) -> Case:
    store = data.make_store(index=IndexConfig(factory, recall=target))
    store.read(query, "topk", k=k)

    def facts() -> Mapping[str, float]:
        return {
            "told": store.index_stats().recall or 0.0,
            "of 1,024 other queries": store.audit(data.draw_queries(1024), k).mean_recall,
            "probes": float(store.index_stats().nprobe or 0),
        }

    return Case(
        f"recall {target}, k = {k}; {len(query)} queries, {len(store):,} rows",
        softdb={"topk": wrap_no_grad(lambda: store.read(query, "topk", k=k))},
        peers={"exact": wrap_no_grad(lambda: store.read(query))},
        facts=facts,
    )


# -- real rows ---------------------------------------------------------------------------------------------------------


def _make_real_cases(small: bool) -> Iterator[Case]:
    """Make cases of tables with some thousand rows; every eighth row is a query."""
    senses = load_senses()
    table = senses.keys.float()
    yield _make_table_case("senses", table, table, "cosine", (0.64, 0.32, 0.16, 0.08, 0.04, 0.02), small)
    digits = load_digits()
    pixels = torch.from_numpy(digits.data).float() / 16
    labels = torch.nn.functional.one_hot(torch.from_numpy(digits.target)).float()
    yield _make_table_case("digits", pixels, labels, "l2", (8.0, 4.0, 2.0, 1.0, 0.5, 0.25), small)


def _make_table_case(
    name: str, keys: Tensor, values: Tensor, metric: str, temperatures: Sequence[float], small: bool
) -> Case:
    is_query = torch.arange(len(keys)) % 8 == 0
    store = SoftKVStore(keys.shape[1], values.shape[1], metric=metric)  # type: ignore[arg-type]
    store.add(keys[~is_query], values[~is_query])
    query = keys[is_query][: 16 if small else None]
    k, samples = 64, 256
    temperature = temperatures[2]

    def read(count: int) -> Read:
        return store.read(query, "topk", k=k, temperature=temperature, tail_samples=count)

    return Case(
        f"{name}: k = {k}, a tail of {samples:,}; {len(query)} queries, {len(store):,} rows",
        softdb={"with the tail": wrap_no_grad(lambda: read(samples))},
        peers={"without": wrap_no_grad(lambda: read(0)), "exact": wrap_no_grad(lambda: store.read(query))},
        facts=lambda: measure_tail_errors(store, query, temperatures, k, samples),
    )


def _make_unbiased_case(draws: int) -> Case:
    """Make a case that measures the bias of the tail, in standard errors.

    The root mean square of the errors is about 1 for an unbiased estimate.
    """
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(400, width, generator=generator, dtype=torch.float64) for width in (8, 3))
    store = SoftKVStore(
        8, 3, trainable=True, sparse_grad=True, index=IndexConfig("IVF16,Flat", recall=0.5), dtype=torch.float64
    )
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
        drawn = [torch.stack(one) for one in zip(*(estimates(read()) for _ in range(draws)), strict=True)]
        names = ("normaliser", "numerator", "its gradient")
        return {
            f"{name}, standard errors": float(
                ((one.mean(0) - truth).abs() / (one.std(0) / draws**0.5)).square().mean().sqrt()
            )
            for name, one, truth in zip(names, drawn, estimates(store.read(query)), strict=True)
        }

    return Case(
        f"means of {draws:,} draws of 40 of 400 rows",
        softdb={"with the tail": wrap_no_grad(read)},
        peers={"exact": wrap_no_grad(lambda: store.read(query))},
        facts=facts,
    )


if __name__ == "__main__":
    main("approximation", cases)
