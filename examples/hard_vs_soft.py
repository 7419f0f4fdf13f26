"""Classify digits by looking similar ones up, hard and softly, and see which reads answer well.

The rows of the store are images of digits, as they are: the key is the pixels, the value the label. An image held out
asks for the labels of those near it. `softdb.lab.comparison` reads in every way, at six temperatures: all rows or the k
best, weighted by softmax, sparsemax or entmax15, and the best row alone. Each image is held out once, in one fold.

Two tables say how many labels are right, and how far answers lie from the exact blend at the same temperature. A third
takes for each fold the temperature that did best on the others, so that none is chosen by what it is tested on. What
differs from the hard read by no more than chance may do is not called better or worse. Needs scikit-learn; no download.

Found: no read is better than the hard one by more than that; a softmax of all rows at temperature 1 or above is worse.
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
TEMPERATURE = 0.5  # of the store; those compared are from 8 times that to a quarter of it


def table_of(images: Tensor, labels: Tensor) -> SoftKVStore:
    store = SoftKVStore(key_dim=images.shape[1], value_dim=10, metric="l2", temperature=TEMPERATURE)
    store.add(images, one_hot(labels, 10).float())
    return store


def figures(fold: lab.Comparison, field: str) -> Tensor:
    """A figure of each way of reading at each temperature: (ways, temperatures)."""
    found: dict[str, list[float]] = {}
    for setting in fold.settings:  # the softest temperature first
        found.setdefault(setting.name, []).append(getattr(setting, field))
    return torch.tensor(list(found.values()), dtype=torch.float64)


def show(title: str, names: list[str], temperatures: list[float], cells: Tensor, digits: int) -> None:
    print(f"{title:<36}" + "".join(f"{temperature:8.4g}" for temperature in temperatures))
    for name, line in zip(names, cells.tolist(), strict=True):
        print(f"{name:<36}" + "".join(f"{cell:8.{digits}f}" for cell in line))
    print()


def chosen_elsewhere(accuracy: Tensor) -> Tensor:  # (folds, ways, temperatures) -> (folds, ways)
    """Of each fold the accuracy at the temperature that is best, on average, on the others."""
    others = (accuracy.sum(0) - accuracy) / (len(accuracy) - 1)
    return accuracy.gather(2, others.argmax(2, keepdim=True)).squeeze(2)


def conclude(accuracy: Tensor, names: list[str], temperatures: list[float], images: int) -> None:
    """Which reads of the first table differ from the hard one by more than chance."""
    hard = accuracy[names.index("hard"), 0]
    # Two standard errors of the difference of two shares, if they came of different images: here it is less.
    chance = 2 * float(2 * hard * (100 - hard) / images) ** 0.5
    for word, ahead in (("better", accuracy - hard), ("worse", hard - accuracy)):
        places = (ahead > chance).nonzero().tolist()
        those = [f"{names[way]} at {temperatures[column]:g}" for way, column in places]
        print(f"{word} than hard by more than {chance:.1f}: {', '.join(those) or 'none'}")


def explain_a_misread(store: SoftKVStore, labels: Tensor, images: Tensor, wanted: Tensor) -> None:
    """The rows that answer for the first image whose nearest row has another label, if there is one."""
    named = store.read(images, mode="hard").values.argmax(-1)
    for wrong in (named != wanted).nonzero().flatten().tolist()[:1]:
        image = images[wrong]
        title = f"digit {int(wanted[wrong])}, answered {int(store.read(image).values.argmax())} by the exact blend"
        print("\nMisread by the hard read:")
        lab.explain(store, image, [f"digit {label}" for label in labels.tolist()], k=5, query_labels=[title]).table()


def main() -> None:
    parser = argparse.ArgumentParser(description="Digits, looked up hard and softly.")
    parser.add_argument("--small", action="store_true", help="a quick try: half of the images, three folds")
    parser.add_argument("--plot", metavar="FILE", help="draw the last fold, as .png, .svg, ...; needs matplotlib")
    arguments = parser.parse_args()
    pixels, digits = load_digits(return_X_y=True)
    if arguments.small:
        pixels, digits = pixels[::2], digits[::2]
    images, labels = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(digits)
    folds = StratifiedKFold(3 if arguments.small else 5, shuffle=True, random_state=0)
    torch.set_num_threads(1)  # the reads are small: more threads would wait for each other
    started = time.perf_counter()
    found = []
    for stored, held_out in tqdm(list(folds.split(pixels, digits)), disable=None, leave=False):
        store = table_of(images[stored], labels[stored])
        queries, targets = images[held_out], labels[held_out]
        found.append(lab.compare(store, queries, ks=KS, normalizers=NORMALIZERS, targets=targets))
    names = list(dict.fromkeys(setting.name for setting in found[0].settings))
    temperatures = list(dict.fromkeys(setting.temperature for setting in found[0].settings))
    accuracy = 100 * torch.stack([figures(fold, "metric") for fold in found])  # (folds, ways, temperatures)
    distance = torch.stack([figures(fold, "distance") for fold in found])
    show("right labels, %, at temperature", names, temperatures, accuracy.mean(0), 1)
    show("distance from the exact blend", names, temperatures, distance.mean(0), 3)

    chosen = chosen_elsewhere(accuracy)
    ahead = chosen - chosen[:, names.index("hard"), None]
    print(f"{'temperature chosen on other folds':<36}{'right, %':>16}{'ahead of hard':>16}")
    for way, name in enumerate(names):
        parts = chosen[:, way], ahead[:, way]
        cells = [f"{part.mean().round(decimals=2) + 0.0:.2f} ± {part.std():.2f}" for part in parts]
        print(f"{name:<36}" + "".join(f"{cell:>16}" for cell in cells))
    print(f"mean and spread of {len(found)} folds of {len(images):,} images, {time.perf_counter() - started:.0f} s\n")
    conclude(accuracy.mean(0), names, temperatures, len(images))
    explain_a_misread(store, labels[stored], queries, targets)
    if arguments.plot:
        found[-1].plot(arguments.plot)


if __name__ == "__main__":
    main()
