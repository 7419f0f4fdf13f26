"""Train small language models of Python code, with and without memories, and compare them on held-out files.

The text is the standard library of the Python that runs this script. A model is one transformer layer over segments of
32 tokens, in 32 streams. With `ContextMemory`, attention also covers the previous 512 tokens, with the same parameters.
`ProductKeyMemory` replaces the feed-forward layer: it has many parameters, but each token reads no more than the
feed-forward layer has. Models are compared after an equal number of steps, on the same text, and after equal time.
"""

from __future__ import annotations

import argparse
import re
import sysconfig
import time
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from softdb.layers import ContextMemory, ProductKeyMemory
from softdb.optim import RowAdam

DIM, VOCABULARY, STREAMS, SEGMENT, WINDOW = 128, 1024, 32, 32, 4
LIBRARY, PIECE = Path(sysconfig.get_path("stdlib")), re.compile(r"[A-Za-z]+|\n *| +|.", re.DOTALL)


def read_text() -> Iterator[list[Tensor]]:
    """Yield training and held-out segments, (STREAMS, WINDOW + SEGMENT), with WINDOW tokens of context each."""
    files = [PIECE.findall(path.read_text("utf-8")) for path in sorted(LIBRARY.glob("*.py"))]
    training = [file for number, file in enumerate(files) if number % 16]
    frequent = Counter(chain.from_iterable(training)).most_common(VOCABULARY - 256)  # Others are split into bytes.
    numbers = {piece: [256 + number] for number, (piece, _) in enumerate(frequent)}
    for part in (training, files[::16]):
        tokens = [token for piece in chain.from_iterable(part) for token in numbers.get(piece) or piece.encode()]
        streams = torch.tensor(tokens[: len(tokens) // STREAMS * STREAMS]).view(STREAMS, -1)
        yield list(streams.unfold(1, WINDOW + SEGMENT, SEGMENT).unbind(1))


def count_parameters_read(model: nn.Module) -> int:
    """Count the parameters that one token reads, without embeddings and values of rows that it does not read."""
    rest = [part.numel() for name, part in model.named_parameters() if not re.search("store|embedding", name)]
    memories = [module for module in model.modules() if isinstance(module, ProductKeyMemory)]
    return sum(rest) + sum(memory.heads * memory.k * memory.value_dim for memory in memories)


class Model(nn.Module):
    def __init__(self, past: bool, pairs: bool) -> None:
        super().__init__()
        self.past = past
        self.embedding = nn.Embedding(VOCABULARY, DIM)
        self.recent = nn.Conv1d(DIM, DIM, WINDOW - 1)
        self.attention = ContextMemory(2 * DIM, rows=512, heads=2, key_dim=128, value_dim=64)
        self.narrow = nn.Linear(2 * DIM, DIM, bias=False)
        memory = ProductKeyMemory(DIM, rows=128**2, heads=2, k=8, key_dim=64, sparse_grad=True)
        hidden = count_parameters_read(memory) // (2 * DIM)
        self.lookup = memory if pairs else nn.Sequential(nn.Linear(DIM, hidden), nn.GELU(), nn.Linear(hidden, DIM))
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(3))
        self.head = nn.Linear(DIM, VOCABULARY)
        # Initialize the first head as an induction head: it attends to tokens whose predecessors resemble the current
        # tokens. No model learns this within half a minute, so all models start with it.
        queries, keys = self.attention.queries.projection.weight, self.attention.keys.projection.weight
        with torch.no_grad():
            keys[:, :DIM] = 0
            queries[: len(keys)] = keys.roll(DIM, dims=1)

    def forward(self, segment: Tensor) -> Tensor:
        """Return the mean next-token loss of the last SEGMENT tokens."""
        x = self.recent(self.embedding(segment[:, :-1]).mT).mT
        tokens = self.norms[0](x)
        tokens = torch.cat([tokens[:, 1:], tokens[:, :-1]], dim=-1)  # Each token with its predecessor.
        x = x[:, 1:] + self.narrow(self.attention(tokens, write=self.past))
        x = x + self.lookup(self.norms[1](x))
        return nn.functional.cross_entropy(self.head(self.norms[2](x)).mT, segment[:, WINDOW:])


def train(model: Model, text: list[Tensor], held_out: list[Tensor], steps: int, seconds: float) -> str:
    """Train the model; return its perplexity after ``steps`` steps and after ``seconds`` seconds."""
    rest = [part for name, part in model.named_parameters() if "store" not in name]
    values = [part for name, part in model.named_parameters() if "store" in name]
    optimizer = RowAdam([{"params": rest, "lr": 5e-3}, {"params": values, "lr": 0.1}])
    results, step, spent, progress = {}, 0, 0.0, tqdm(disable=None, leave=False)
    while len(results) < 2:
        started = time.perf_counter()
        model(text[step % len(text)]).backward()
        optimizer.step()
        optimizer.zero_grad()
        step, spent, _ = step + 1, spent + time.perf_counter() - started, progress.update()
        for goal, due, cost in (("steps", step >= steps, spent), ("seconds", spent >= seconds, step)):
            if due and goal not in results:
                tested = deepcopy(model)  # With a separate past.
                tested.attention.reset()
                with torch.no_grad():
                    perplexity = torch.stack([tested(segment) for segment in held_out]).mean().exp().item()
                results[goal] = f"{perplexity:>12.2f}{cost:>8.0f}"
    progress.close()
    return results["steps"] + results["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a language model with and without memory.")
    parser.add_argument("--small", action="store_true", help="quick run: fewer steps and seconds")
    steps, seconds, count = (50, 1, 20) if parser.parse_args().small else (300, 30, None)
    text, held_out = read_text()
    print(f"{'perplexity with':<18}{'parameters':>12}{'read':>10}{steps:>6} steps{'s':>8}{seconds:>10} s{'steps':>8}")
    for name in ("no memory", "ContextMemory", "ProductKeyMemory", "both"):
        torch.manual_seed(0)
        model = Model(past=name in ("ContextMemory", "both"), pairs=name in ("ProductKeyMemory", "both"))
        sizes = f"{sum(map(Tensor.numel, model.parameters())):>12,}{count_parameters_read(model):>10,}"
        print(f"{name:<18}{sizes}{train(model, text, held_out[:count], steps, seconds)}", flush=True)


if __name__ == "__main__":
    main()
