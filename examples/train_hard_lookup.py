"""Train an encoder to select one row of a store, from the row's value only, and test it with hard reads.

The 16 rows are the squares of a 4 by 4 board: the value of a row is the position of its square, the key is random, and
both are fixed. The input is a pattern of a square, with noise, which the encoder maps to a query. The loss compares the
values that were read with the position, not the row. So a blend can minimize it with wrong rows: the mean of the left
and the right neighbor of a square is the position of the square.

Four training methods are compared: softmax, straight_through and gumbel at a fixed temperature, and softmax with an
exponentially decaying temperature. They are tested with new noise, by hard reads and by soft reads at the last
temperature. The task is solvable: the nearest pattern to an input is nearly always that of its square.

Result: with softmax at 0.1, soft reads have half the error of hard reads. Decay to 0.1 improves the soft read further,
but not the hard read. At 0.1 gumbel selects the correct row more often than softmax, and its soft and hard reads differ
less; at 1 and at 0.01 it has no clear advantage. No method always selects the correct row.
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

SIDE, PATTERN_DIM, KEY_DIM, NOISE, BATCH, STEPS = 4, 16, 16, 0.5, 128, 400
ROWS = SIDE * SIDE
COLUMNS = ("correct rows, %", "error, hard", "error, soft", "soft to hard", "minus softmax")


@dataclass(frozen=True)
class Method:
    """Training method: the normalizer, and the temperatures of the first and the last step."""

    normalizer: str
    first: float
    last: float

    @property
    def name(self) -> str:
        decay = f"decay from {self.first:g} to {self.last:g}"
        return f"{self.normalizer}, {decay if self.first != self.last else f'at {self.last:g}'}"


def distance(found: Tensor, wanted: Tensor) -> float:  # (B, 2), (B, 2)
    """Compute the root mean square distance, in squares."""
    return math.sqrt(float((found - wanted).square().sum(-1).mean()))


def train_and_test(method: Method, seed: int) -> list[float]:
    """Return all COLUMNS but the last. Patterns, keys and initial weights depend only on the seed."""
    torch.manual_seed(seed)
    patterns = torch.randn(ROWS, PATTERN_DIM)
    positions = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE)).float()  # (ROWS, 2)
    store = SoftKVStore(KEY_DIM, 2, metric="cosine")
    store.add(torch.randn(ROWS, KEY_DIM), positions)
    encoder = nn.Sequential(nn.Linear(PATTERN_DIM, 64), nn.ReLU(), nn.Linear(64, KEY_DIM))
    optimizer = torch.optim.Adam(encoder.parameters(), lr=3e-3)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        squares = torch.randint(ROWS, (count,))
        return patterns[squares] + NOISE * torch.randn(count, PATTERN_DIM), squares

    for step in range(STEPS):
        temperature = method.first * (method.last / method.first) ** (step / (STEPS - 1))
        x, squares = draw(BATCH)
        read = store.read(encoder(x), temperature=temperature, normalizer=method.normalizer)
        loss = (read.values - positions[squares]).square().sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    with torch.no_grad():
        x, squares = draw(4096)
        query, wanted = encoder(x), positions[squares]
        hard, soft = store.read(query, mode="hard"), store.read(query, temperature=method.last).values
        correct = 100 * float((hard.values == wanted).all(-1).float().mean())
    return [correct, distance(hard.values, wanted), distance(soft, wanted), distance(soft, hard.values)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Train for hard reads by four methods.")
    parser.add_argument("--small", action="store_true", help="quick run: one temperature, two seeds")
    small = parser.parse_args().small
    temperatures, seeds = ((0.1,), 2) if small else ((1.0, 0.1, 0.01), 5)
    fixed = ("softmax", "straight_through", "gumbel")
    methods = [Method(normalizer, t, t) for normalizer in fixed for t in temperatures]
    methods += [Method("softmax", 1.0, last) for last in temperatures if last < 1]
    torch.set_num_threads(1)  # The tensors are too small for several threads.
    started = time.perf_counter()
    runs = [(method, seed) for method in methods for seed in range(seeds)]
    results = [train_and_test(method, seed) for method, seed in tqdm(runs, disable=None, leave=False)]
    table = torch.tensor(results).view(len(methods), seeds, -1)
    baselines = [methods.index(Method("softmax", method.last, method.last)) for method in methods]
    difference = table[:, :, :1] - table[baselines, :, :1]  # For each seed.
    table = torch.cat([table, difference], dim=-1)
    mean, std = table.mean(1), table.std(1)
    print(f"{'trained by':<32}" + "".join(f"{column:>18}" for column in COLUMNS))
    for number, method in enumerate(methods):
        pairs = zip(mean[number].tolist(), std[number].tolist(), (1, 2, 2, 2, 1), strict=True)
        print(f"{method.name:<32}" + "".join(f"{f'{m:.{d}f} ± {s:.{d}f}':>18}" for m, s, d in pairs))
    print(f"\nmost correct rows: {methods[int(mean[:, 0].argmax())].name}")
    print(f"smallest error of the soft read: {methods[int(mean[:, 2].argmin())].name}")
    print(f"errors in squares, mean and standard deviation of {seeds} seeds, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
