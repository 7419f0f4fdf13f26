"""Classify digits with hard, top-k and soft reads, and compare their accuracy.

Each row of the store is an image of a digit: the key is the pixels, the value is the label. A held-out image is a query
for the labels of similar images. `softdb.lab.compare` reads with six temperatures: all rows or the k best rows, by
softmax, sparsemax or entmax15, and the best row only. Every image is held out once, in one fold of a cross-validation.

Two tables show the accuracy, and the distance from the exact blend at the same temperature. A third table chooses the
temperature of each fold by the accuracy on the other folds, so that no temperature is chosen on its test images. Reads
count as better or worse than the hard read beyond two standard errors only. Requires scikit-learn; no download.
Result: no read is better than the hard read; a softmax over all rows is worse at temperature 1 and above.
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
TEMPERATURE = 0.5  # of the store; the comparison uses 8 to 0.25 times this temperature


def build_digit_store(images: Tensor, labels: Tensor) -> SoftKVStore:
    store = SoftKVStore(key_dim=images.shape[1], value_dim=10, metric="l2", temperature=TEMPERATURE)
    store.add(images, one_hot(labels, 10).float())
    return store


def collect(fold: lab.Comparison, field: str) -> Tensor:
    """Collect a figure of each read at each temperature, (reads, temperatures)."""
    found: dict[str, list[float]] = {}
    for setting in fold.settings:  # highest temperature first
        found.setdefault(setting.name, []).append(getattr(setting, field))
    return torch.tensor(list(found.values()), dtype=torch.float64)


def print_table(title: str, names: list[str], temperatures: list[float], cells: Tensor, digits: int) -> None:
    print(f"{title:<36}" + "".join(f"{temperature:8.4g}" for temperature in temperatures))
    for name, line in zip(names, cells.tolist(), strict=True):
        print(f"{name:<36}" + "".join(f"{cell:8.{digits}f}" for cell in line))
    print()


def cross_validate(accuracy: Tensor) -> Tensor:  # (folds, reads, temperatures) -> (folds, reads)
    """Return the accuracy of each fold at the best temperature of the other folds."""
    others = (accuracy.sum(0) - accuracy) / (len(accuracy) - 1)
    return accuracy.gather(2, others.argmax(2, keepdim=True)).squeeze(2)


def conclude(accuracy: Tensor, names: list[str], temperatures: list[float], images: int) -> None:
    """Print the reads whose accuracy differs significantly from that of the hard read."""
    hard = accuracy[names.index("hard"), 0]
    # Two standard errors of the difference of two proportions. All reads share the images, so this is an upper bound.
    margin = 2 * float(2 * hard * (100 - hard) / images) ** 0.5
    for word, ahead in (("better", accuracy - hard), ("worse", hard - accuracy)):
        places = (ahead > margin).nonzero().tolist()
        reads = [f"{names[read]} at {temperatures[column]:g}" for read, column in places]
        print(f"{word} than hard by more than {margin:.1f}: {', '.join(reads) or 'none'}")


def explain_error(store: SoftKVStore, labels: Tensor, images: Tensor, wanted: Tensor) -> None:
    """Print the rows and weights of the first image that the hard read misclassifies."""
    predicted = store.read(images, mode="hard").values.argmax(-1)
    for wrong in (predicted != wanted).nonzero().flatten().tolist()[:1]:
        image = images[wrong]
        title = f"digit {int(wanted[wrong])}, classified as {int(store.read(image).values.argmax())} by the exact read"
        names = [f"digit {label}" for label in labels.tolist()]
        print("\nMisclassified by the hard read:")
        print(lab.explain(store, image, names, k=5, query_labels=[title]))


def main() -> None:
    parser = argparse.ArgumentParser(description="Classify digits with hard, top-k and soft reads.")
    parser.add_argument("--small", action="store_true", help="a quick run: half of the images, three folds")
    parser.add_argument("--plot", metavar="FILE", help="plot the last fold, as .png, .svg, ...; requires matplotlib")
    arguments = parser.parse_args()
    pixels, digits = load_digits(return_X_y=True)
    if arguments.small:
        pixels, digits = pixels[::2], digits[::2]
    images, labels = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(digits)
    folds = StratifiedKFold(3 if arguments.small else 5, shuffle=True, random_state=0)
    torch.set_num_threads(1)  # the reads are too small for several threads
    started = time.perf_counter()
    results = []
    for stored, held_out in tqdm(list(folds.split(pixels, digits)), disable=None, leave=False):
        store = build_digit_store(images[stored], labels[stored])
        queries, targets = images[held_out], labels[held_out]
        results.append(lab.compare(store, queries, ks=KS, normalizers=NORMALIZERS, targets=targets))
    names = list(dict.fromkeys(setting.name for setting in results[0].settings))
    temperatures = list(dict.fromkeys(setting.temperature for setting in results[0].settings))
    accuracy = 100 * torch.stack([collect(fold, "metric") for fold in results])  # (folds, reads, temperatures)
    distance = torch.stack([collect(fold, "distance") for fold in results])
    print_table("accuracy, %, at temperature", names, temperatures, accuracy.mean(0), 1)
    print_table("distance from the exact blend", names, temperatures, distance.mean(0), 3)

    chosen = cross_validate(accuracy)
    ahead = chosen - chosen[:, names.index("hard"), None]
    print(f"{'temperature of the other folds':<36}{'accuracy, %':>16}{'ahead of hard':>16}")
    for read, name in enumerate(names):
        parts = chosen[:, read], ahead[:, read]
        cells = [f"{part.mean().round(decimals=2) + 0.0:.2f} ± {part.std():.2f}" for part in parts]
        print(f"{name:<36}" + "".join(f"{cell:>16}" for cell in cells))
    print(f"mean and deviation of {len(results)} folds, {len(images)} images, {time.perf_counter() - started:.0f} s\n")
    conclude(accuracy.mean(0), names, temperatures, len(images))
    explain_error(store, labels[stored], queries, targets)
    if arguments.plot:
        results[-1].plot(arguments.plot)


if __name__ == "__main__":
    main()
