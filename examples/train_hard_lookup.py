"""Train an encoder to pick one row of a store, told only what the row's value is, and test it with hard lookups.

The 16 rows are the squares of a 4 by 4 board: the value of each is its place, its key is random, and both stay as they
are. A square shows a sign, with noise, and an encoder turns it into a query. Only the place that was read is corrected,
never which row. So a blend can cheat: half of the square to the left and half of that to the right is the one between.

Four ways to train: read by softmax, by straight_through or by gumbel at a fixed temperature, or by softmax while the
temperature is lowered, by the same factor each step. Each is tested with new noise, by the hard read and by the soft
one at the temperature that training ended with. A square can be told: the sign nearest to what is seen is nearly always
its own.

Found: softmax at 0.1 learns to blend: its soft answers are half as wrong as its hard ones. Lowering the temperature to
0.1 makes the blend better still, not the choice. At 0.1 gumbel finds the right row more often than softmax does, and
its soft and hard answers agree better; at 1 and at 0.01 it is no clear help. No way points right every time.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from softdb import SoftKVStore

SIDE, SIGN_DIM, KEY_DIM, NOISE, BATCH, STEPS = 4, 16, 16, 0.5, 128, 400
ROWS = SIDE * SIDE
COLUMNS = ("right rows, %", "error, hard", "error, soft", "soft to hard", "ahead of softmax")


@dataclass(frozen=True)
class Way:
    """A way to train: what weighs the rows, and the temperature of the first step and of the last."""

    normalizer: str
    first: float
    last: float

    @property
    def name(self) -> str:
        lowered = f"lowered from {self.first:g} to {self.last:g}"
        return f"{self.normalizer}, {lowered if self.first != self.last else f'at {self.last:g}'}"


def distance(found: Tensor, wanted: Tensor) -> float:  # (B, 2), (B, 2)
    """The root mean square distance, in squares."""
    return math.sqrt(float((found - wanted).square().sum(-1).mean()))


def train_and_test(way: Way, seed: int) -> list[float]:
    """The figures of COLUMNS, but for the last. Signs, keys and the encoder's start depend on the seed alone."""
    torch.manual_seed(seed)
    signs = torch.randn(ROWS, SIGN_DIM)
    places = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE)).float()  # (ROWS, 2)
    store = SoftKVStore(KEY_DIM, 2, metric="cosine")
    store.add(torch.randn(ROWS, KEY_DIM), places)
    encoder = nn.Sequential(nn.Linear(SIGN_DIM, 64), nn.ReLU(), nn.Linear(64, KEY_DIM))
    optimizer = torch.optim.Adam(encoder.parameters(), lr=3e-3)

    def show(count: int) -> tuple[Tensor, Tensor]:
        squares = torch.randint(ROWS, (count,))
        return signs[squares] + NOISE * torch.randn(count, SIGN_DIM), squares

    for step in range(STEPS):
        temperature = way.first * (way.last / way.first) ** (step / (STEPS - 1))
        seen, squares = show(BATCH)
        read = store.read(encoder(seen), temperature=temperature, normalizer=way.normalizer)
        loss = (read.values - places[squares]).square().sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    with torch.no_grad():
        seen, squares = show(4096)
        query, wanted = encoder(seen), places[squares]
        hard, soft = store.read(query, mode="hard"), store.read(query, temperature=way.last).values
        right = 100 * float((hard.values == wanted).all(-1).float().mean())
    return [right, distance(hard.values, wanted), distance(soft, wanted), distance(soft, hard.values)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Train for hard lookups in four ways.")
    parser.add_argument("--small", action="store_true", help="a quick try: one temperature, three seeds")
    small = parser.parse_args().small
    temperatures, seeds = ((0.1,), 3) if small else ((1.0, 0.1, 0.01), 5)
    fixed = ("softmax", "straight_through", "gumbel")
    ways = [Way(normalizer, t, t) for normalizer in fixed for t in temperatures]
    ways += [Way("softmax", 1.0, last) for last in temperatures if last < 1]
    torch.set_num_threads(1)  # the tensors are small: more threads would wait for each other
    started = time.perf_counter()
    runs = [(way, seed) for way in ways for seed in range(seeds)]
    found = [train_and_test(way, seed) for way, seed in tqdm(runs, disable=None, leave=False)]
    figures = torch.tensor(found).view(len(ways), seeds, -1)
    peers = [ways.index(Way("softmax", way.last, way.last)) for way in ways]  # with the same last temperature
    ahead = figures[:, :, :1] - figures[peers, :, :1]  # seed by seed
    figures = torch.cat([figures, ahead], dim=-1)
    mean, spread = figures.mean(1), figures.std(1)
    print(f"{'trained by':<32}" + "".join(f"{column:>18}" for column in COLUMNS))
    for number, way in enumerate(ways):
        pairs = zip(mean[number].tolist(), spread[number].tolist(), (1, 2, 2, 2, 1), strict=True)
        print(f"{way.name:<32}" + "".join(f"{f'{m:.{d}f} ± {s:.{d}f}':>18}" for m, s, d in pairs))
    print(f"\nmost right rows: {ways[int(mean[:, 0].argmax())].name}")
    print(f"smallest error of the soft read: {ways[int(mean[:, 2].argmin())].name}")
    print(f"errors in squares, mean and spread of {seeds} seeds; {STEPS} steps, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
