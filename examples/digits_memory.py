"""Learn digits two classes at a time, and measure how much of the earlier classes is forgotten.

A network that learns the digits 0 and 1, then 2 and 3, and so on, forgets the first digits: each new image updates
weights that all images use. A memory with fixed keys updates only the values of the few rows that an image reads (as in
Träuble et al. 2023, arXiv 2207.11240). How much is forgotten depends on whether different digits read different rows,
and so on the keys. Here keys are random, or queries of images of the first two digits, or of all images, in each case
without labels. The last case needs all images in advance: it suits tasks whose labels arrive later than the images.

The baselines are the same memory with all parts trained, and a network with one hidden layer and an equal number of
parameters. Requires scikit-learn; downloads nothing.
"""

from __future__ import annotations

import argparse
import time
from typing import Literal

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from softdb.layers import MemoryLayer
from softdb.optim import RowAdam

PIXELS, CLASSES, ROWS = 64, 10, 1000
LR, VALUES_LR = 1e-3, 0.1
ALL_AT_ONCE = [range(CLASSES)]
TWO_AT_A_TIME = [range(first, first + 2) for first in range(0, CLASSES, 2)]

Keys = Literal["random", "first", "all"]


def make_memory_classifier() -> nn.Sequential:
    memory = MemoryLayer(
        PIXELS, ROWS, heads=4, key_dim=32, value_dim=16, mode="topk", k=4, query_norm="layer", sparse_grad=True
    )
    return nn.Sequential(memory, nn.Linear(PIXELS, CLASSES))


def make_values_classifier(images: Tensor, labels: Tensor, keys: Keys) -> nn.Sequential:
    """Make a classifier whose only trained parameters are the values, which start at 0."""
    model = make_memory_classifier().requires_grad_(False)
    layer = model[0]
    store = layer.store
    if keys != "random":
        sample = images if keys == "all" else images[torch.isin(labels, torch.tensor(TWO_AT_A_TIME[0]))]
        queries = layer.queries(sample).flatten(0, -2)  # One query per head and image.
        store.update(store.ids, keys=queries[torch.randint(len(queries), (ROWS,))])
    store.update(store.ids, values=torch.zeros_like(store.values))
    store.values.requires_grad_()
    return model


def make_hidden_layer() -> nn.Sequential:
    """Make a network with the parameter count of the classifier with a memory."""
    parameters = sum(parameter.numel() for parameter in make_memory_classifier().parameters())
    width = parameters // (PIXELS + 1 + CLASSES)
    return nn.Sequential(nn.Linear(PIXELS, width), nn.ReLU(), nn.Linear(width, CLASSES))


def train(model: nn.Sequential, images: Tensor, labels: Tensor, epochs: int) -> None:
    values = [model[0].store.values] if isinstance(model[0], MemoryLayer) else []
    others = [p for p in model.parameters() if p.requires_grad and not any(p is own for own in values)]
    optimizer = RowAdam([{"params": values, "lr": VALUES_LR}, {"params": others, "lr": LR}])
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(32):
            optimizer.zero_grad()
            cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()


def measure_accuracy(seed: int, epochs: int) -> dict[str, list[float]]:
    """Return the test accuracy of each model in percent: all digits learned at once, and two at a time."""
    pixels, digits = load_digits(return_X_y=True)
    split = train_test_split(pixels / 8 - 1, digits, test_size=500, stratify=digits, random_state=seed)
    images, tests = (torch.tensor(part, dtype=torch.float32) for part in split[:2])
    labels, wanted = (torch.tensor(part) for part in split[2:])
    makers = {
        "hidden layer": make_hidden_layer,
        "memory, all parts trained": make_memory_classifier,
        "values trained, random keys": lambda: make_values_classifier(images, labels, "random"),
        "values trained, keys of 0 and 1": lambda: make_values_classifier(images, labels, "first"),
        "values trained, keys of all": lambda: make_values_classifier(images, labels, "all"),
    }
    accuracy: dict[str, list[float]] = {name: [] for name in makers}
    for name, make in makers.items():
        for tasks in (ALL_AT_ONCE, TWO_AT_A_TIME):
            torch.manual_seed(seed)
            model = make()
            for task in tasks:
                in_task = torch.isin(labels, torch.tensor(task))
                train(model, images[in_task], labels[in_task], epochs)
            with torch.no_grad():
                accuracy[name].append(100 * (model(tests).argmax(-1) == wanted).float().mean().item())
    return accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description="Learn digits two classes at a time, with and without a memory.")
    parser.add_argument("--small", action="store_true", help="quick run: one seed instead of five")
    seeds = 1 if parser.parse_args().small else 5
    started = time.perf_counter()
    runs = [measure_accuracy(seed, epochs=3) for seed in tqdm(range(seeds), disable=None, leave=False)]
    print(f"{'test accuracy, %':<32} {'all at once':>14} {'two at a time':>14}")
    for name in runs[0]:
        accuracy = torch.tensor([run[name] for run in runs])
        cells = [f"{mean:.1f}" for mean in accuracy.mean(0)]
        if seeds > 1:
            cells = [f"{mean} ± {std:.1f}" for mean, std in zip(cells, accuracy.std(0), strict=True)]
        print(f"{name:<32} {cells[0]:>14} {cells[1]:>14}")
    print(f"mean and standard deviation over seeds: {seeds}, in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
