"""Train an encoder through a store of labeled examples, and compare it with baselines.

A small network encodes the image of a digit as a key. The store holds the key and the label of every training image. A
read with the key of an image blends the labels of similar images: a differentiable nearest-neighbor classifier, whose
gradients train the encoder. Requires scikit-learn; downloads nothing.

The two baselines use pixels, without the augmentation of the training images.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from torch.nn.functional import nll_loss, one_hot

from softdb import SoftKVStore
from softdb.functional import merge, soft_read

KEY_DIM = 32
READ_OPTIONS = {"metric": "cosine", "temperature": 0.05}


def train(images: Tensor, labels: Tensor, epochs: int, title: str) -> tuple[nn.Module, SoftKVStore]:
    """Train an encoder; return it and the store of all encoded training images."""
    encoder = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Dropout(0.1), nn.Linear(256, KEY_DIM))
    targets = one_hot(labels, 10).float()
    store = SoftKVStore(KEY_DIM, 10, **READ_OPTIONS)
    ids = store.add(encoder(images), targets)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(epochs):
        for batch in torch.randperm(len(images)).split(128):
            keys = encoder(shift_randomly(images[batch]))
            # An image must not read its own row, whose label is the target. Stored keys are detached from the graph, so
            # the rows of the batch are excluded and read from `keys` instead, without each image's own row. Merged, the
            # two equal one read of all other rows, whose gradient reaches the batch both as queries and as keys.
            stored = store.read(keys, exclude=ids[batch].expand(len(batch), -1))
            others = ~torch.eye(len(batch), dtype=torch.bool)
            in_batch = soft_read(keys, keys, targets[batch], mask=others, **READ_OPTIONS)
            probabilities = merge([stored, in_batch]).values  # (B, 10)
            loss = nll_loss(probabilities.clamp(min=1e-6).log(), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            store.update(ids[batch], keys=keys)
        schedule.step()
        show_progress(f"{title}: epoch {epoch + 1} of {epochs}, loss {loss.item():.3f}")
    encoder.eval()
    store.update(ids, keys=encoder(images))  # Encode all rows with the final encoder.
    return encoder, store


def shift_randomly(images: Tensor) -> Tensor:  # (B, 64)
    """Shift a random half of the images by one pixel: up, down, left or right."""
    squares = images.view(-1, 8, 8)
    direction = torch.randint(8, (len(images), 1, 1))
    for number, (rows, columns) in enumerate([(-1, 0), (1, 0), (0, -1), (0, 1)]):
        squares = torch.where(direction == number, squares.roll((rows, columns), dims=(1, 2)), squares)
    return squares.flatten(1)


def measure_accuracy(seed: int, train_size: int, epochs: int) -> dict[str, float]:
    """Return the test accuracy of each method."""
    torch.manual_seed(seed)
    pixels, digits = load_digits(return_X_y=True)
    pixels = pixels / 16
    split = train_test_split(pixels, digits, train_size=train_size, stratify=digits, random_state=seed)
    x_train, x_test, y_train, y_test = split
    images, labels = torch.tensor(x_train, dtype=torch.float32), torch.tensor(y_train)
    encoder, store = train(images, labels, epochs, f"seed {seed}")
    with torch.no_grad():
        query = encoder(torch.tensor(x_test, dtype=torch.float32))
        reads = {
            "softdb, exact read": store.read(query),
            "softdb, top-k read (k=10)": store.read(query, mode="topk", k=10),
            "softdb, hard read": store.read(query, mode="hard"),
        }
    return {
        "linear classifier on pixels": LogisticRegression(max_iter=1000).fit(x_train, y_train).score(x_test, y_test),
        "nearest neighbor on pixels": KNeighborsClassifier(1).fit(x_train, y_train).score(x_test, y_test),
        **{name: float((read.values.argmax(-1).numpy() == y_test).mean()) for name, read in reads.items()},
    }


def show_progress(text: str) -> None:
    """Overwrite the current line of a terminal."""
    if sys.stdout.isatty():
        print(f"\r{text:<60}\r", end="", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Classify digits by reads of similar digits.")
    parser.add_argument("--small", action="store_true", help="quick run: one seed, fewer images and epochs")
    small = parser.parse_args().small
    seeds, train_size, epochs = (1, 300, 8) if small else (3, 900, 40)
    started = time.perf_counter()
    runs = [measure_accuracy(seed, train_size, epochs) for seed in range(seeds)]
    show_progress("")
    print(f"{train_size} training images, {time.perf_counter() - started:.0f} s")
    print(f"{'test accuracy, %':<30} {'mean':>6}   each seed")
    for name in runs[0]:
        scores = [100 * run[name] for run in runs]
        print(f"{name:<30} {sum(scores) / seeds:6.2f}   {', '.join(f'{score:.2f}' for score in scores)}")


if __name__ == "__main__":
    main()
