"""How much of a softmax do the k best rows miss, and how far is their blend off? Two tables, from soft reads to hard.

A top-k read blends the k best rows as if there were no others. Here rows that are held out ask word senses (the key an
embedding, the value a part of speech) and digits (pixels and label). At each temperature: the mass of the k best, and
the error norm(answer - exact) / norm(exact), a mean; the same with a sample of the rows left out, the error that such
reads tell, and how often it was enough. Samples are large parts of such small tables. Needs scikit-learn and tqdm.

Found: the k best alone do where they hold nearly all of the mass. Where it is less than half, 512 rows sampled besides
bring the blend nearer than four times k do. Where few rows hold the rest, a small sample adds little or nothing.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import torch
from hard_vs_soft import figures, show, table_of
from sklearn.datasets import load_digits
from torch.linalg import vector_norm
from tqdm import tqdm

from softdb import SoftKVStore, lab
from softdb.cli.demo import load_senses, store_of

KS = {4: "C3", 16: "C4", 64: "black", 256: "C9"}  # and their colours
SAMPLES = {0: "black", 128: "C1", 512: "C2", 2048: "C0"}
DRAWN = 64  # of this k errors are drawn, and those that reads tell are printed


class Missed(NamedTuple):
    """What was found on one table."""

    title: str
    temperatures: list[float]
    best: lab.Comparison  # the exact read, and then the k best
    ways: list[tuple[int, int]]  # k, and how many rows are sampled
    errors: torch.Tensor  # the mean, the mean of those told, and for how many that was enough: (3, ways, temperatures)

    def table(self) -> None:
        names = [f"k = {k}, {sampled:,} sampled" if sampled else f"k = {k}" for k, sampled in self.ways]
        tails = [place for place, (k, sampled) in enumerate(self.ways) if k == DRAWN and sampled]
        told_by, columns = [names[place] for place in tails], self.temperatures
        rows, (off, told, enough) = figures(self.best, "effective_rows")[:1], self.errors
        show("rows that answer, at temperature", ["exp(entropy), exactly"], columns, rows, 1)
        show("mass of the k best rows", [f"k = {k}" for k in KS], columns, figures(self.best, "mass")[1:], 3)
        show("relative error of the blend", names, columns, off, 4)
        show("error that the read tells", told_by, columns, told[tails], 4)
        show("told no less than it was, %", told_by, columns, 100 * enough[tails], 0)

    def draw(self, left: Any, right: Any) -> None:
        answering, *masses = figures(self.best, "effective_rows")[0], *figures(self.best, "mass")[1:]
        steps = [f"{step:g}\n{rows:,.0f}" for step, rows in zip(self.temperatures, answering, strict=True)]
        for k, mass in zip(KS, masses, strict=True):
            left.plot(steps, mass, ".-", color=KS[k], label=f"k = {k}")
        for (k, sampled), off, told in zip(self.ways, *self.errors[:2], strict=True):
            if k == DRAWN:
                right.semilogy(steps, off, ".-", color=SAMPLES[sampled], label=f"{k} best, {sampled:,} sampled")
                right.semilogy(steps, told, ":", color=SAMPLES[sampled])  # 0 and out of sight if nothing is sampled
        left.set(title=f"{self.title}: mass of the k best", ylabel="share of the softmax", ylim=(0, 1.05))
        right.set(title="error of the blend; dotted: as the read tells it", ylabel="relative error", ylim=(1e-4, 5))
        for axes, corner in ((left, "upper left"), (right, "lower left")):
            axes.set_xlabel("temperature, and how many rows answer")
            axes.legend(loc=corner)


def measure(name: str, store: SoftKVStore, temperatures: list[float], held_out: int) -> Missed:
    dice = torch.Generator().manual_seed(0)
    ids = store.ids[torch.randperm(len(store), generator=dice)[:held_out]]
    queries = store.get(ids).keys
    store.delete(ids)
    samples = [count for count in SAMPLES if count < len(store) - max(KS)]  # as many as are left would make it exact
    parts = ", ".join(f"{count:,} ({100 * count / len(store):.0f} %)" for count in samples[1:])
    print(f"{name}: {len(queries)} queries to {len(store):,} rows, of which samples take {parts}\n")
    best = lab.compare(store, queries, modes=("exact", "topk"), ks=tuple(KS), temperatures=temperatures)
    ways = [(k, sampled) for k in KS for sampled in samples]
    bar = tqdm(ways, disable=None, leave=False)
    found = [[look(store, queries, at, k, sampled, dice) for at in temperatures] for k, sampled in bar]
    return Missed(f"{name}, {len(store):,} rows", temperatures, best, ways, torch.tensor(found).movedim(-1, 0))


def look(store: SoftKVStore, queries: torch.Tensor, at: float, k: int, sampled: int, dice: Any) -> list[float]:
    """Means over the queries at a temperature: the error, that which is told, and if it is no less but for rounding."""
    options = {"tail_samples": sampled, "generator": dice} if sampled else {}
    exact = store.read(queries, temperature=at).values
    few = queries.split(8)  # what is read at once shares a sample: no one sample shall decide the figures by luck
    reads = [store.read(part, "topk", k=k, temperature=at, **options) for part in few]
    off = vector_norm(torch.cat([read.values for read in reads]) - exact, dim=-1) / vector_norm(exact, dim=-1)
    told = torch.cat([torch.zeros(len(read.values)) if read.error is None else read.error for read in reads])
    return [float(part.double().mean()) for part in (off, told, told + 1e-6 >= off)]


def main() -> None:
    parser = argparse.ArgumentParser(description="How much of a softmax top-k reads miss.")
    parser.add_argument("--small", action="store_true", help="a quick try: few queries, every other temperature")
    parser.add_argument("--plot", metavar="FILE", help="draw it, as .png, .svg, ...; needs matplotlib")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the reads are small: more threads would wait for each other
    pixels, labels = map(torch.tensor, load_digits(return_X_y=True))
    tables = {"senses": (store_of(load_senses()), 1.28), "digits": (table_of(pixels.float() / 16, labels), 32.0)}
    found = []
    for name, (store, softest) in tables.items():  # where softest, 256 rows hold less than a fifth of the mass
        temperatures = [softest / 2**halved for halved in range(0, 8, 2 if arguments.small else 1)]
        found.append(measure(name, store, temperatures, 32 if arguments.small else 297))
        found[-1].table()
    if arguments.plot:
        try:
            from matplotlib.figure import Figure
        except ImportError:
            parser.exit(1, "The picture needs matplotlib: pip install 'softdb[plot]', and run this again.\n")
        figure = Figure(figsize=(12, 9), layout="constrained")
        for missed, line in zip(found, figure.subplots(2, 2), strict=True):
            missed.draw(*line)
        figure.suptitle("What the k best rows miss of a softmax")
        figure.savefig(arguments.plot, dpi=80)


if __name__ == "__main__":
    main()
