"""Train an encoder of digits without labels, by contrast with a queue of earlier keys.

Momentum contrast (MoCo, He et al. 2020, arXiv 1911.05722): two distorted copies of an image give a query and a positive
key. The negative keys are those of the last batches. They come from a copy of the encoder that moves slowly, so that
they stay comparable. The queue is a store with ``evict="oldest"``, and ``read.lse`` is the log-sum-exp of all negative
scores, which are never held at once. The new keys enter the queue before the backward: the store keeps the keys that
they evict until the backward has used them.

The test classifies an image by the nearest of a few labeled images. Requires scikit-learn; downloads nothing.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from softdb import SoftKVStore

KEY_DIM, QUEUE_ROWS, BATCH = 64, 1024, 128
TEMPERATURE, LR, MOMENTUM = 0.2, 2e-3, 0.98
TEST_IMAGES, DRAWS, LABELS_PER_DIGIT = 500, 10, (1, 3, 10)


def distort(images: Tensor) -> Tensor:  # (n, 64) -> (n, 64)
    """Rotate, scale, shear and shift images at random, and add noise."""
    angle, scale, shear, right, down = (torch.rand(5, len(images)) - 0.5) * torch.tensor(
        [[0.7], [0.4], [0.4], [0.5], [0.5]]
    )
    cos, sin = angle.cos() * scale.exp(), angle.sin() * scale.exp()
    matrices = torch.stack([cos, sin + shear, right, -sin, cos, down], dim=-1).view(-1, 2, 3)
    grid = F.affine_grid(matrices, [len(images), 1, 8, 8], align_corners=False)
    moved = F.grid_sample(images.view(-1, 1, 8, 8), grid, align_corners=False).flatten(1)
    return moved + 0.2 * torch.randn_like(moved)


def train(encoder: nn.Module, images: Tensor, steps: int) -> tuple[float, float]:
    """Train an encoder in place; return the loss of the first steps with a full queue, and of the last ones."""
    momentum_encoder = copy.deepcopy(encoder).requires_grad_(False)
    queue = SoftKVStore(KEY_DIM, 0, metric="cosine", temperature=TEMPERATURE, capacity=QUEUE_ROWS, evict="oldest")
    optimizer = torch.optim.Adam(encoder.parameters(), lr=LR)
    losses = []
    for _ in tqdm(range(steps), disable=None, leave=False):
        batch = images[torch.randint(len(images), (BATCH,))]
        query = encoder(distort(batch))
        with torch.no_grad():
            key = momentum_encoder(distort(batch))
        positive = F.cosine_similarity(query, key, dim=-1) / TEMPERATURE
        read = queue.read(query)
        loss = (torch.logaddexp(positive, read.lse) - positive).mean()  # InfoNCE
        queue.add(key, key[:, :0])  # evicts the oldest keys, which the backward still uses
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(momentum_encoder.parameters(), encoder.parameters(), strict=True):
                slow.lerp_(fast, 1 - MOMENTUM)
        if len(queue) == QUEUE_ROWS:
            losses.append(loss.item())
    return sum(losses[:10]) / len(losses[:10]), sum(losses[-10:]) / len(losses[-10:])


@torch.no_grad()
def measure_accuracy(encode: Callable[[Tensor], Tensor], images: Tensor, digits: Tensor) -> list[float]:
    """Return the accuracy of the nearest labeled key in percent, for each number of labels per digit."""
    keys = encode(images)
    found = []
    for count in LABELS_PER_DIGIT:
        right = 0.0
        for draw in range(DRAWS):
            generator = torch.Generator().manual_seed(draw)
            order = TEST_IMAGES + torch.randperm(len(images) - TEST_IMAGES, generator=generator)
            labeled = torch.cat([order[digits[order] == digit][:count] for digit in range(10)])
            store = SoftKVStore(keys.shape[1], 10, metric="cosine")
            store.add(keys[labeled], F.one_hot(digits[labeled], 10).float())
            answer = store.read(keys[:TEST_IMAGES], "hard").values.argmax(-1)
            right += (answer == digits[:TEST_IMAGES]).float().mean().item()
        found.append(100 * right / DRAWS)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Train an encoder of digits with a queue of negative keys.")
    parser.add_argument("--small", action="store_true", help="quick run: 100 steps instead of 2,000")
    steps = 100 if parser.parse_args().small else 2000
    torch.manual_seed(0)
    pixels, classes = load_digits(return_X_y=True)
    order = torch.randperm(len(pixels))  # The first images are for the test.
    images, digits = torch.tensor(pixels / 16, dtype=torch.float32)[order], torch.tensor(classes)[order]
    encoder = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, KEY_DIM))
    table = {"pixels": measure_accuracy(lambda x: x, images, digits)}
    table["encoder before training"] = measure_accuracy(encoder, images, digits)
    started = time.perf_counter()
    first, last = train(encoder, images[TEST_IMAGES:], steps)
    print(f"{steps:,} steps in {time.perf_counter() - started:.0f} s; loss {first:.2f} at first, {last:.2f} at the end")
    table["encoder after training"] = measure_accuracy(encoder, images, digits)
    print(f"{'test accuracy, %':<26}" + "".join(f"{f'{count} per digit':>14}" for count in LABELS_PER_DIGIT))
    for name, accuracy in table.items():
        print(f"{name:<26}" + "".join(f"{percent:14.1f}" for percent in accuracy))


if __name__ == "__main__":
    main()
