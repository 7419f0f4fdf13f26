"""Classify digits by hard and soft reads of similar digits, and compare their accuracy.

The rows of the store are images of digits: the key is the pixels, the value is the one-hot label. A held-out image is
the query. `softdb.lab.compare` reads at six temperatures in each mode: all rows or the k best, weighted by softmax,
sparsemax or entmax15, and the best row only. The folds hold out each image once.

Two tables show the accuracy and the distance from the exact softmax read at the same temperature. A third table chooses
the temperature of each fold by the accuracy on the other folds. A read is reported as better or worse than the hard
read if the difference exceeds two standard errors. Requires scikit-learn; downloads nothing.

Result: no read is better than the hard read; exact softmax reads at temperatures of 1 and above are worse.
"""

from __future__ import annotations

import argparse
import time

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold
from torch import Tensor
from torch.nn.functional import one_hot
from tqdm import tqdm

from softdb import SoftKVStore, lab

KS, NORMALIZERS = (4, 16), ("softmax", "sparsemax", "entmax15")
TEMPERATURE = 0.5  # Temperature of the store. The comparison uses from 8 times to a quarter of it.


def make_store(images: Tensor, labels: Tensor) -> SoftKVStore:
    store = SoftKVStore(key_dim=images.shape[1], value_dim=10, metric="l2", temperature=TEMPERATURE)
    store.add(images, one_hot(labels, 10).float())
    return store


def collect(fold: lab.Comparison, field: str) -> Tensor:
    """Return a field of each kind of read at each temperature: (reads, temperatures)."""
    columns: dict[str, list[float]] = {}
    for setting in fold.settings:  # From the highest temperature to the lowest.
        columns.setdefault(setting.name, []).append(getattr(setting, field))
    return torch.tensor(list(columns.values()), dtype=torch.float64)


def show(title: str, names: list[str], temperatures: list[float], cells: Tensor, digits: int) -> None:
    print(f"{title:<36}" + "".join(f"{temperature:8.4g}" for temperature in temperatures))
    for name, line in zip(names, cells.tolist(), strict=True):
        print(f"{name:<36}" + "".join(f"{cell:8.{digits}f}" for cell in line))
    print()


def cross_validate(accuracy: Tensor) -> Tensor:  # (folds, reads, temperatures) -> (folds, reads)
    """Return each fold's accuracy at the temperature with the best mean accuracy on the other folds."""
    others = (accuracy.sum(0) - accuracy) / (len(accuracy) - 1)
    return accuracy.gather(2, others.argmax(2, keepdim=True)).squeeze(2)


def print_differences(accuracy: Tensor, names: list[str], temperatures: list[float], images: int) -> None:
    """Print the reads of the first table whose accuracy differs from that of the hard read."""
    hard = accuracy[names.index("hard"), 0]
    # Two standard errors of a difference of two independent proportions: an upper bound, since the images are the same.
    margin = 2 * float(2 * hard * (100 - hard) / images) ** 0.5
    for word, difference in (("better", accuracy - hard), ("worse", hard - accuracy)):
        cells = (difference > margin).nonzero().tolist()
        reads = [f"{names[row]} at {temperatures[column]:g}" for row, column in cells]
        print(f"{word} than hard by more than {margin:.1f}: {', '.join(reads) or 'none'}")


def explain_error(store: SoftKVStore, labels: Tensor, images: Tensor, wanted: Tensor) -> None:
    """Print the rows that the first misclassified image reads, if there is one."""
    predicted = store.read(images, mode="hard").values.argmax(-1)
    for wrong in (predicted != wanted).nonzero().flatten().tolist()[:1]:
        image = images[wrong]
        title = f"digit {int(wanted[wrong])}, classified as {int(store.read(image).values.argmax())} by the exact read"
        print("\nMisclassified by the hard read:")
        lab.explain(store, image, [f"digit {label}" for label in labels.tolist()], k=5, query_labels=[title]).table()


def main() -> None:
    parser = argparse.ArgumentParser(description="Classify digits by hard and soft reads.")
    parser.add_argument("--small", action="store_true", help="quick run: half of the images, three folds")
    parser.add_argument("--plot", metavar="FILE", help="plot the last fold, as .png, .svg, ...; requires matplotlib")
    arguments = parser.parse_args()
    pixels, digits = load_digits(return_X_y=True)
    if arguments.small:
        pixels, digits = pixels[::2], digits[::2]
    images, labels = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(digits)
    folds = StratifiedKFold(3 if arguments.small else 5, shuffle=True, random_state=0)
    torch.set_num_threads(1)  # The reads are too small for several threads.
    started = time.perf_counter()
    comparisons = []
    for stored, held_out in tqdm(list(folds.split(pixels, digits)), disable=None, leave=False):
        store = make_store(images[stored], labels[stored])
        queries, targets = images[held_out], labels[held_out]
        comparisons.append(lab.compare(store, queries, ks=KS, normalizers=NORMALIZERS, targets=targets))
    names = list(dict.fromkeys(setting.name for setting in comparisons[0].settings))
    temperatures = list(dict.fromkeys(setting.temperature for setting in comparisons[0].settings))
    accuracy = 100 * torch.stack([collect(fold, "metric") for fold in comparisons])  # (folds, reads, temperatures)
    distance = torch.stack([collect(fold, "distance") for fold in comparisons])
    show("accuracy, %, at temperature", names, temperatures, accuracy.mean(0), 1)
    show("distance from the exact softmax", names, temperatures, distance.mean(0), 3)

    chosen = cross_validate(accuracy)
    difference = chosen - chosen[:, names.index("hard"), None]
    print(f"{'temperature chosen on other folds':<36}{'accuracy, %':>16}{'minus hard':>16}")
    for row, name in enumerate(names):
        parts = chosen[:, row], difference[:, row]
        cells = [f"{part.mean().round(decimals=2) + 0.0:.2f} ± {part.std():.2f}" for part in parts]
        print(f"{name:<36}" + "".join(f"{cell:>16}" for cell in cells))
    print(f"mean and standard deviation of {len(comparisons)} folds, {time.perf_counter() - started:.0f} s\n")
    print_differences(accuracy.mean(0), names, temperatures, len(images))
    explain_error(store, labels[stored], queries, targets)
    if arguments.plot:
        comparisons[-1].plot(arguments.plot)


if __name__ == "__main__":
    main()
