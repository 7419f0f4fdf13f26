"""Measure the softmax mass that top-k reads miss, and their error, on two tables at several temperatures.

A top-k read ignores all rows but the k best. Here held-out rows are the queries of word senses (key: an embedding,
value: a part of speech) and of digits (pixels and label). The tables show, for each temperature, the mean mass of the k
best rows and the mean error norm(values - exact) / norm(exact); the same with a sampled tail, with the error that the
read estimates, and how often the estimate is an upper bound. Requires scikit-learn and tqdm.

Result: the k best rows are accurate if they hold nearly all of the mass. If they hold less than half, a tail of 512
samples reduces the error more than four times k does. If few rows hold the rest, a small sample has little effect.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import torch
from hard_vs_soft import collect, make_store, show
from sklearn.datasets import load_digits
from torch.linalg import vector_norm
from tqdm import tqdm

from softdb import SoftKVStore, lab
from softdb.cli.demo import build_store, load_senses

KS = {4: "C3", 16: "C4", 64: "black", 256: "C9"}  # k, and its colour in the plot.
TAIL_SAMPLES = {0: "black", 128: "C1", 512: "C2", 2048: "C0"}
PLOTTED_K = 64  # The k whose errors are plotted, and whose estimated errors are printed.


class Measurement(NamedTuple):
    """Mass and errors of the top-k reads of one table."""

    title: str
    temperatures: list[float]
    best: lab.Comparison  # The exact read, then top-k reads.
    ways: list[tuple[int, int]]  # k and tail_samples of each read.
    errors: torch.Tensor  # Mean error, mean estimate, fraction of upper bounds: (3, ways, temperatures).

    def print_tables(self) -> None:
        names = [f"k = {k}, {samples:,} samples" if samples else f"k = {k}" for k, samples in self.ways]
        tails = [number for number, (k, samples) in enumerate(self.ways) if k == PLOTTED_K and samples]
        tail_names, columns = [names[number] for number in tails], self.temperatures
        rows, (error, estimate, is_bound) = collect(self.best, "effective_rows")[:1], self.errors
        show("effective rows, at temperature", ["exp(entropy) of exact reads"], columns, rows, 1)
        show("mass of the k best rows", [f"k = {k}" for k in KS], columns, collect(self.best, "mass")[1:], 3)
        show("relative error of the values", names, columns, error, 4)
        show("estimated error", tail_names, columns, estimate[tails], 4)
        show("estimate is an upper bound, %", tail_names, columns, 100 * is_bound[tails], 0)

    def plot(self, left: Any, right: Any) -> None:
        effective, *masses = collect(self.best, "effective_rows")[0], *collect(self.best, "mass")[1:]
        ticks = [f"{step:g}\n{rows:,.0f}" for step, rows in zip(self.temperatures, effective, strict=True)]
        for k, mass in zip(KS, masses, strict=True):
            left.plot(ticks, mass, ".-", color=KS[k], label=f"k = {k}")
        for (k, samples), error, estimate in zip(self.ways, *self.errors[:2], strict=True):
            if k == PLOTTED_K:
                right.semilogy(ticks, error, ".-", color=TAIL_SAMPLES[samples], label=f"k = {k}, {samples:,} samples")
                right.semilogy(ticks, estimate, ":", color=TAIL_SAMPLES[samples])  # 0, not visible, without samples.
        left.set(title=f"{self.title}: mass of the k best", ylabel="fraction of the softmax", ylim=(0, 1.05))
        right.set(title="error of the values; dotted: estimate", ylabel="relative error", ylim=(1e-4, 5))
        for axes, corner in ((left, "upper left"), (right, "lower left")):
            axes.set_xlabel("temperature, and effective rows")
            axes.legend(loc=corner)


def measure(name: str, store: SoftKVStore, temperatures: list[float], held_out: int) -> Measurement:
    generator = torch.Generator().manual_seed(0)
    ids = store.ids[torch.randperm(len(store), generator=generator)[:held_out]]
    queries = store.get(ids).keys
    store.delete(ids)
    counts = [count for count in TAIL_SAMPLES if count < len(store) - max(KS)]  # A sample of all rows would be exact.
    parts = ", ".join(f"{count:,} ({100 * count / len(store):.0f} %)" for count in counts[1:])
    print(f"{name}: {len(queries)} queries, {len(store):,} rows; samples: {parts}\n")
    best = lab.compare(store, queries, modes=("exact", "topk"), ks=tuple(KS), temperatures=temperatures)
    ways = [(k, count) for k in KS for count in counts]
    bar = tqdm(ways, disable=None, leave=False)
    errors = [[measure_error(store, queries, at, k, count, generator) for at in temperatures] for k, count in bar]
    return Measurement(f"{name}, {len(store):,} rows", temperatures, best, ways, torch.tensor(errors).movedim(-1, 0))


def measure_error(store: SoftKVStore, queries: torch.Tensor, at: float, k: int, count: int, rng: Any) -> list[float]:
    """Return means over the queries: the error, the estimate, and whether the estimate is an upper bound."""
    options = {"tail_samples": count, "generator": rng} if count else {}
    exact = store.read(queries, temperature=at).values
    parts = queries.split(8)  # The queries of one call share a sample. Several calls average over samples.
    reads = [store.read(part, "topk", k=k, temperature=at, **options) for part in parts]
    error = vector_norm(torch.cat([read.values for read in reads]) - exact, dim=-1) / vector_norm(exact, dim=-1)
    estimate = torch.cat([torch.zeros(len(read.values)) if read.error is None else read.error for read in reads])
    return [float(part.double().mean()) for part in (error, estimate, estimate + 1e-6 >= error)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the softmax mass that top-k reads miss.")
    parser.add_argument("--small", action="store_true", help="quick run: few queries, every other temperature")
    parser.add_argument("--plot", metavar="FILE", help="plot the results, as .png, .svg, ...; requires matplotlib")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # The reads are too small for several threads.
    pixels, labels = map(torch.tensor, load_digits(return_X_y=True))
    tables = {"senses": (build_store(load_senses()), 1.28), "digits": (table_of(pixels.float() / 16, labels), 32.0)}
    found = []
    for name, (store, softest) in tables.items():  # where softest, 256 rows hold less than a fifth of the mass
        temperatures = [softest / 2**halved for halved in range(0, 8, 2 if arguments.small else 1)]
        found.append(measure(name, store, temperatures, 32 if arguments.small else 297))
        found[-1].table()
    if arguments.plot:
        try:
            from matplotlib.figure import Figure
        except ImportError:
            parser.exit(1, "The plot requires matplotlib: pip install 'softdb[plot]', and run this again.\n")
        figure = Figure(figsize=(12, 9), layout="constrained")
        for result, axes in zip(results, figure.subplots(2, 2), strict=True):
            result.plot(*axes)
        figure.suptitle("Softmax mass that top-k reads miss")
        figure.savefig(arguments.plot, dpi=80)


if __name__ == "__main__":
    main()
