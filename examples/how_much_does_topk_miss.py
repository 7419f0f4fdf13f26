"""Measure the softmax mass that top-k reads miss and the error of their blends, on two data sets.

A top-k read blends the k best rows and ignores the others. Held-out rows are queries to a store of word senses
(embedding, part of speech) and to one of digits (pixels, label). Tables show the mass of the k best rows and the
mean error norm(answer - exact) / norm(exact), without and with a tail sample, for each temperature. They also show the
error that the read reports, and how often it is an upper bound. Requires scikit-learn and tqdm.

Result: the k best rows suffice where they hold nearly all mass. Where they hold less than half, a tail sample of 512
rows reduces the error more than four times k does. A small sample does not help where few rows hold the other mass.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import torch
from hard_vs_soft import build_digit_store, collect, print_table
from sklearn.datasets import load_digits
from torch.linalg import vector_norm
from tqdm import tqdm

from softdb import SoftKVStore, lab
from softdb.cli.demo import build_store, load_senses

KS = {4: "C3", 16: "C4", 64: "black", 256: "C9"}  # k -> color
SAMPLES = {0: "black", 128: "C1", 512: "C2", 2048: "C0"}  # tail_samples -> color
PLOTTED_K = 64  # the errors for this k are plotted, and the reported errors are printed


class Result(NamedTuple):
    """Result for one data set."""

    title: str
    temperatures: list[float]
    best: lab.Comparison  # the exact read, then the top-k reads
    reads: list[tuple[int, int]]  # k and tail_samples
    errors: torch.Tensor  # (3, reads, temperatures): mean error, mean reported error, fraction with an upper bound

    def print_tables(self) -> None:
        names = [f"k = {k}, {sampled:,} sampled" if sampled else f"k = {k}" for k, sampled in self.reads]
        tails = [place for place, (k, sampled) in enumerate(self.reads) if k == PLOTTED_K and sampled]
        sampled_names, columns = [names[place] for place in tails], self.temperatures
        rows, (error, reported, bounded) = collect(self.best, "effective_rows")[:1], self.errors
        print_table("effective rows, at temperature", ["exp(entropy), exact"], columns, rows, 1)
        print_table("mass of the k best rows", [f"k = {k}" for k in KS], columns, collect(self.best, "mass")[1:], 3)
        print_table("relative error of the blend", names, columns, error, 4)
        print_table("error that the read reports", sampled_names, columns, reported[tails], 4)
        print_table("reported error is a bound, %", sampled_names, columns, 100 * bounded[tails], 0)

    def plot(self, left: Any, right: Any) -> None:
        rows, masses = collect(self.best, "effective_rows")[0], collect(self.best, "mass")[1:]
        steps = [f"{step:g}\n{count:,.0f}" for step, count in zip(self.temperatures, rows, strict=True)]
        for k, mass in zip(KS, masses, strict=True):
            left.plot(steps, mass, ".-", color=KS[k], label=f"k = {k}")
        for (k, sampled), error, reported in zip(self.reads, *self.errors[:2], strict=True):
            if k == PLOTTED_K:
                right.semilogy(steps, error, ".-", color=SAMPLES[sampled], label=f"{k} best, {sampled:,} sampled")
                right.semilogy(steps, reported, ":", color=SAMPLES[sampled])  # 0, thus invisible, without a sample
        left.set(title=f"{self.title}: mass of the k best", ylabel="fraction of the softmax", ylim=(0, 1))
        right.set(title="error of the blend; dotted: reported error", ylabel="relative error", ylim=(1e-4, 5))
        for axes, corner in ((left, "upper left"), (right, "lower left")):
            axes.set_xlabel("temperature and effective rows")
            axes.legend(loc=corner)


def measure(name: str, store: SoftKVStore, temperatures: list[float], held_out: int) -> Result:
    generator = torch.Generator().manual_seed(0)
    ids = store.ids[torch.randperm(len(store), generator=generator)[:held_out]]
    queries = store.get(ids).keys
    store.delete(ids)
    samples = [count for count in SAMPLES if count < len(store) - max(KS)]  # a sample of all other rows would be exact
    parts = ", ".join(f"{count:,} ({100 * count / len(store):.0f} %)" for count in samples[1:])
    print(f"{name}: {len(queries)} queries to {len(store):,} rows; tail samples of {parts} rows\n")
    best = lab.compare(store, queries, modes=("exact", "topk"), ks=tuple(KS), temperatures=temperatures)
    reads = [(k, sampled) for k in KS for sampled in samples]
    bar = tqdm(reads, disable=None, leave=False)
    found = [[read_errors(store, queries, at, k, sampled, generator) for at in temperatures] for k, sampled in bar]
    return Result(f"{name}, {len(store):,} rows", temperatures, best, reads, torch.tensor(found).movedim(-1, 0))


def read_errors(store: SoftKVStore, queries: torch.Tensor, at: float, k: int, sampled: int, rng: Any) -> list[float]:
    """Return means over queries: error, reported error, and whether that is an upper bound."""
    options = {"tail_samples": sampled, "generator": rng} if sampled else {}
    exact = store.read(queries, temperature=at).values
    batches = queries.split(8)  # a batch shares one sample, so several batches average over samples
    reads = [store.read(part, "topk", k=k, temperature=at, **options) for part in batches]
    error = vector_norm(torch.cat([read.values for read in reads]) - exact, dim=-1) / vector_norm(exact, dim=-1)
    reported = torch.cat([torch.zeros(len(read.values)) if read.error is None else read.error for read in reads])
    return [float(part.double().mean()) for part in (error, reported, reported + 1e-6 >= error)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what top-k reads miss of a softmax.")
    parser.add_argument("--small", action="store_true", help="a quick run: few queries, every other temperature")
    parser.add_argument("--plot", metavar="FILE", help="plot the result, as .png, .svg, ...; requires matplotlib")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the reads are too small for several threads
    pixels, labels = map(torch.tensor, load_digits(return_X_y=True))
    digits, found = build_digit_store(pixels.float() / 16, labels), []
    # The second number is the highest temperature, at which 256 rows hold less than a fifth of the mass.
    for name, store, highest in (("senses", build_store(load_senses()), 1.28), ("digits", digits, 32.0)):
        temperatures = [highest / 2**power for power in range(0, 8, 2 if arguments.small else 1)]
        found.append(measure(name, store, temperatures, 32 if arguments.small else 297))
        found[-1].print_tables()
    if arguments.plot:
        try:
            from matplotlib.figure import Figure
        except ImportError:
            parser.exit(1, "The plot requires matplotlib: pip install 'softdb[plot]'\n")
        figure = Figure(figsize=(12, 9), layout="constrained")
        for result, line in zip(found, figure.subplots(2, 2), strict=True):
            result.plot(*line)
        figure.suptitle("Softmax mass and error of the k best rows")
        figure.savefig(arguments.plot, dpi=80)


if __name__ == "__main__":
    main()
