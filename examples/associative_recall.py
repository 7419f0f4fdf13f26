"""Train a model to recall values from earlier segments, with and without a memory.

Each segment of a sequence begins with key-value pairs, which are random for each sequence, so that weights cannot store
them. The rest of the segment repeats keys of this segment or of earlier segments, separated by blanks, and the model
predicts their values: multi-query associative recall (Arora et al. 2023, arXiv 2312.04927).

A short convolution mixes each token with the previous one, so that a value can be found by its key. Both models attend
to the current segment; one also attends to earlier segments. Stored tokens are detached from the graph. Their
projections are learned from queries within a segment, and also work across segments and for longer sequences.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from softdb.layers import ContextMemory

DIM, BATCH, TEST_LENGTH_FACTOR, BLANK, IGNORE_INDEX = 64, 32, 4, 0, -1


@dataclass
class Task:
    """Size of the sequences. The vocabulary is a blank, ``words`` keys and ``words`` values."""

    segments: int
    words: int
    length: int = 32  # Tokens per segment.
    pairs: int = 4  # Key-value pairs at the start of each segment.
    questions: int = 8  # Repeated keys per segment.

    def sequences(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield a batch by segment: tokens, targets, and whether each target is a value of this segment."""
        keys = 1 + torch.rand(BATCH, self.words).argsort(dim=1)[:, : self.segments * self.pairs]
        values = 1 + self.words + torch.randint(self.words, keys.shape)
        prefix = 2 * self.pairs
        for first in range(0, self.segments * self.pairs, self.pairs):
            new = slice(first, first + self.pairs)
            asked = torch.randint(new.stop, (BATCH, self.questions))
            positions = prefix + torch.rand(BATCH, self.length - prefix).argsort(dim=1)[:, : self.questions]
            tokens = torch.full((BATCH, self.length), BLANK).scatter(1, positions, keys.gather(1, asked))
            tokens[:, :prefix] = torch.stack([keys[:, new], values[:, new]], dim=-1).flatten(1)
            targets = torch.full_like(tokens, IGNORE_INDEX).scatter(1, positions, values.gather(1, asked))
            recent = torch.zeros_like(tokens, dtype=torch.bool).scatter(1, positions, asked >= first)
            yield tokens, targets, recent


class Model(nn.Module):
    """Embedding, short convolution, attention with an optional memory, and a linear classifier."""

    def __init__(self, task: Task, remember: bool) -> None:
        super().__init__()
        self.remember = remember
        words = 1 + 2 * task.words
        self.embedding = nn.Embedding(words, DIM)
        self.convolution = nn.Conv1d(DIM, DIM, kernel_size=2, padding=1)
        self.memory = ContextMemory(DIM, rows=TEST_LENGTH_FACTOR * task.segments * task.length, heads=2, key_dim=32)
        self.scores = nn.Linear(DIM, words)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, n) -> (B, n, words)
        x = self.embedding(tokens)
        x = x + self.convolution(x.mT)[..., :-1].mT
        return self.scores(x + self.memory(x, write=self.remember))


def train(task: Task, remember: bool, steps: int) -> Model:
    model = Model(task, remember)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in tqdm(range(steps), disable=None, leave=False):
        model.memory.reset()
        optimizer.zero_grad()
        for tokens, targets, _ in task.sequences():
            loss = cross_entropy(model(tokens).mT, targets, ignore_index=IGNORE_INDEX)
            loss.backward()  # Before the next segment, so that the graph of only one segment is held.
        optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def compute_accuracy(model: Model, task: Task, batches: int = 10) -> tuple[float, float, float]:
    """Compute the accuracy in percent: of all values, of values of the same segment, and of earlier segments."""
    correct, recent = [], []
    for _ in range(batches):
        model.memory.reset()
        for tokens, targets, is_recent in task.sequences():
            asked = targets != IGNORE_INDEX
            correct.append((model(tokens).argmax(-1) == targets)[asked])
            recent.append(is_recent[asked])
    hits, near = 100 * torch.cat(correct).float(), torch.cat(recent)
    return hits.mean().item(), hits[near].mean().item(), hits[~near].mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description="Recall values from earlier segments, with and without a memory.")
    parser.add_argument("--small", action="store_true", help="quick run: shorter sequences, fewer words and steps")
    small = parser.parse_args().small
    task, steps = (Task(segments=3, words=48), 170) if small else (Task(segments=8, words=128), 600)
    torch.manual_seed(0)
    started = time.perf_counter()
    models = {"with memory": train(task, True, steps), "without": train(task, False, steps)}
    print(f"{'accuracy, %':<32} {'all':>6} {'same segment':>13} {'earlier one':>12}")
    for tested in (task, replace(task, segments=TEST_LENGTH_FACTOR * task.segments)):
        for name, model in models.items():
            every, same, earlier = compute_accuracy(model, tested)
            print(f"{f'{tested.segments} segments, {name}':<32} {every:6.2f} {same:13.2f} {earlier:12.2f}")
    print(f"trained on {task.segments} segments of {task.length} tokens, in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
