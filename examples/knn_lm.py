"""Add a nearest-neighbor memory to a trained language model, without more training, and compare perplexities.

The model predicts the next token of Python code from its hidden state. The memory (Khandelwal et al. 2020, arXiv
1911.00172) has a row for each token of training text: its key is a hidden state, and its field the token that followed.
The tokens that followed the nearest neighbors of a hidden state make a second prediction. The two are mixed:

    p = share * p_memory + (1 - share) * p_model

The text is the standard library of the Python that runs this script. One file of 16 is for the test. Another one, the
validation text, chooses the share and the temperature. The other 14 train the model, and some of them fill the memory.
"""

from __future__ import annotations

import argparse
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, nll_loss
from tqdm import tqdm

from softdb import SoftKVStore
from softdb.functional import class_weights

DIM, VOCABULARY, STREAMS, SEGMENT = 128, 1024, 32, 64
NEIGHBORS, TEMPERATURES, SHARES = 64, (0.3, 1.0, 3.0, 10.0), (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
LIBRARY, PIECE = Path(sysconfig.get_path("stdlib")), re.compile(r"[A-Za-z]+|\n *| +|.", re.DOTALL)


def read_text() -> Iterator[Tensor]:
    """Yield the tokens of the training, validation and test files."""
    files = [PIECE.findall(path.read_text("utf-8")) for path in sorted(LIBRARY.glob("*.py"))]
    training = [file for number, file in enumerate(files) if number % 16 > 1]
    frequent = Counter(chain.from_iterable(training)).most_common(VOCABULARY - 256)  # Others are split into bytes.
    numbers = {piece: [256 + number] for number, (piece, _) in enumerate(frequent)}
    for part in (training, files[::16], files[1::16]):
        pieces = chain.from_iterable(part)
        yield torch.tensor([token for piece in pieces for token in numbers.get(piece) or piece.encode()])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, DIM)
        self.recurrent = nn.GRU(DIM, DIM, batch_first=True)
        self.head = nn.Linear(DIM, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, length)
        """Return the hidden state after each token, (B, length, DIM)."""
        return self.recurrent(self.embedding(tokens))[0]


def train(model: Model, text: Tensor, steps: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in tqdm(range(steps), disable=None, leave=False):
        segments = text[torch.randint(len(text) - SEGMENT, (STREAMS, 1)) + torch.arange(SEGMENT + 1)]
        loss = cross_entropy(model.head(model(segments[:, :-1])).mT, segments[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def encode(model: Model, text: Tensor) -> tuple[Tensor, Tensor]:
    """Return hidden states, (n, DIM), and the tokens that followed them, (n,)."""
    streams = text[: len(text) // STREAMS * STREAMS].view(STREAMS, -1)
    return model(streams[:, :-1]).flatten(0, 1), streams[:, 1:].flatten()


@torch.no_grad()
def measure_perplexity(model: Model, store: SoftKVStore, states: Tensor, following: Tensor) -> Tensor:
    """Return the perplexity at each temperature and share, (temperatures, shares)."""
    read = store.read(states, mode="topk", k=NEIGHBORS)  # At the store's temperature, 1.
    tokens = store.fields_at(read.ids, "token")  # (n, k)
    p_model = model.head(states).softmax(-1)  # (n, VOCABULARY)
    table = []
    for temperature in TEMPERATURES:  # The neighbors are the same at each, so one search serves all.
        p_memory = class_weights(tokens, (read.scores / temperature).softmax(-1), VOCABULARY)
        mixed = (share * p_memory + (1 - share) * p_model for share in SHARES)
        table.append([nll_loss(p.log(), following).exp() for p in mixed])
    return torch.tensor(table)


def report(model: Model, store: SoftKVStore, validation: list[Tensor], test: list[Tensor]) -> None:
    """Print the perplexities at the temperature and the share that are best on the validation text."""
    tuning, result = (measure_perplexity(model, store, *text) for text in (validation, test))
    best = divmod(int(tuning.argmin()), len(SHARES))
    chosen = f"{TEMPERATURES[best[0]]:>13}{SHARES[best[1]]:>7}"
    print(f"{len(store):>14,}{chosen}{tuning[best]:>12.2f}{result[best]:>8.2f}{result[0, 0]:>9.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Mix the predictions of a language model and of a memory.")
    parser.add_argument("--small", action="store_true", help="quick run: fewer steps, rows and held-out tokens")
    parser.add_argument("--seed", type=int, default=0, help="seed of the model and its training")
    arguments = parser.parse_args()
    steps, rows, queries = (25, 16_000, 500) if arguments.small else (300, 256_000, 4_000)
    torch.manual_seed(arguments.seed)
    training, *held_out = read_text()
    model = Model()
    train(model, training, steps)
    keys, following = encode(model, training[:rows])
    validation, test = ([part[:: len(text) // queries] for part in encode(model, text)] for text in held_out)
    start, rest = slice(rows // 4), slice(rows // 4, None)
    store = SoftKVStore.from_tensors(keys[start], keys[start, :0], fields={"token": following[start]}, metric="l2")
    print(f"{'rows in memory':>14}{'temperature':>13}{'share':>7}{'validation':>12}{'test':>8}{'without':>9}")
    report(model, store, validation, test)
    store.add(keys[rest], keys[rest, :0], fields={"token": following[rest]})
    report(model, store, validation, test)


if __name__ == "__main__":
    main()
