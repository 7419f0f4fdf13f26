"""Learn digits two classes at a time, never seeing the earlier ones again, and see what is left of them.

A network that learns the digits 0 and 1, then 2 and 3, and so on, forgets what it learned first: each new image moves
weights that all images use. A memory with fixed keys moves only the values of the few rows that an image finds (as in
Träuble et al. 2023, arXiv 2207.11240). How much that keeps is a matter of the keys, whether different digits find
different rows: here they are random, or made of images of the first two digits, or of all, always without the labels.
The last needs the images in advance: it is for tasks where labels come late and images are at hand.

Beside it are the same memory with every part trained, and a network with one hidden layer and as many parameters.
Needs scikit-learn; no download.
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
STEP, STEP_OF_VALUES = 1e-3, 0.1
TOGETHER = [range(CLASSES)]
IN_TURN = [range(first, first + 2) for first in range(0, CLASSES, 2)]

Keys = Literal["random", "first", "all"]


def classifier_with_memory() -> nn.Sequential:
    memory = MemoryLayer(PIXELS, ROWS, heads=4, key_dim=32, value_dim=16, mode="topk", k=4, query_norm="layer")
    return nn.Sequential(memory, nn.Linear(PIXELS, CLASSES))


def memory_of_values(images: Tensor, labels: Tensor, keys: Keys) -> nn.Sequential:
    """A classifier of which the values alone are trained; they start at 0."""
    model = classifier_with_memory().requires_grad_(False)
    layer = model[0]
    store = layer.store
    if keys != "random":
        shown = images if keys == "all" else images[torch.isin(labels, torch.tensor(IN_TURN[0]))]
        looked_for = layer.queries(shown).flatten(0, -2)  # one of each head and image
        store.update(store.ids, keys=looked_for[torch.randint(len(looked_for), (ROWS,))])
    store.update(store.ids, values=torch.zeros_like(store.values))
    store.values.requires_grad_()
    return model


def hidden_layer() -> nn.Sequential:
    """A network with as many parameters as the classifier with a memory."""
    parameters = sum(parameter.numel() for parameter in classifier_with_memory().parameters())
    width = parameters // (PIXELS + 1 + CLASSES)
    return nn.Sequential(nn.Linear(PIXELS, width), nn.ReLU(), nn.Linear(width, CLASSES))


def learn(model: nn.Sequential, images: Tensor, labels: Tensor, epochs: int) -> None:
    values = [model[0].store.values] if isinstance(model[0], MemoryLayer) else []
    others = [p for p in model.parameters() if p.requires_grad and not any(p is own for own in values)]
    optimizer = RowAdam([{"params": values, "lr": STEP_OF_VALUES}, {"params": others, "lr": STEP}])
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(32):
            optimizer.zero_grad()
            cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()


def accuracies(seed: int, epochs: int) -> dict[str, list[float]]:
    """For each model the percentage of test images named rightly, all digits learned together, and in turn."""
    pixels, digits = load_digits(return_X_y=True)
    split = train_test_split(pixels / 8 - 1, digits, test_size=500, stratify=digits, random_state=seed)
    images, tests = (torch.tensor(part, dtype=torch.float32) for part in split[:2])
    labels, wanted = (torch.tensor(part) for part in split[2:])
    makers = {
        "hidden layer": hidden_layer,
        "memory, every part trained": classifier_with_memory,
        "values trained, keys random": lambda: memory_of_values(images, labels, "random"),
        "values trained, keys of 0 and 1": lambda: memory_of_values(images, labels, "first"),
        "values trained, keys of all": lambda: memory_of_values(images, labels, "all"),
    }
    found: dict[str, list[float]] = {name: [] for name in makers}
    for name, make in makers.items():
        for tasks in (TOGETHER, IN_TURN):
            torch.manual_seed(seed)
            model = make()
            for task in tasks:
                seen = torch.isin(labels, torch.tensor(task))
                learn(model, images[seen], labels[seen], epochs)
            with torch.no_grad():
                found[name].append(100 * (model(tests).argmax(-1) == wanted).float().mean().item())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Digits, two classes at a time, with a memory and without.")
    parser.add_argument("--small", action="store_true", help="a quick try: two seeds instead of five")
    seeds = 2 if parser.parse_args().small else 5
    started = time.perf_counter()
    runs = [accuracies(seed, epochs=3) for seed in tqdm(range(seeds), disable=None, leave=False)]
    print(f"{'test accuracy, %':<32} {'all together':>14} {'two at a time':>14}")
    for name in runs[0]:
        figures = torch.tensor([run[name] for run in runs])
        cells = [f"{mean:.1f} ± {spread:.1f}" for mean, spread in zip(figures.mean(0), figures.std(0), strict=True)]
        print(f"{name:<32} {cells[0]:>14} {cells[1]:>14}")
    print(f"mean and spread of {seeds} seeds, in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
