"""Train a model to recall what it was told segments ago, with a memory of them and without.

Each segment of a sequence begins with pairs of a key and a value. They are drawn anew for each sequence, so that no
weight can know them. Among the blanks that follow, keys of this segment or of earlier ones come again, and the model
names their values: multi-query associative recall (Arora et al. 2023, arXiv 2312.04927).

A short convolution tells each token of the one before it, so that a value can be found by its key. Both models attend
to the segment at hand; one remembers those before as well. What is stored is cut from the graph, so that what to store
is learned from questions within a segment, where it suffices for those across segments, and for longer sequences.
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

DIM, BATCH, LONGER, BLANK, UNASKED = 64, 32, 4, 0, -1


@dataclass
class Task:
    """The size of the sequences. Words are a blank, then ``words`` keys and as many values."""

    segments: int
    words: int
    length: int = 32  # of a segment, in tokens
    pairs: int = 4  # at the start of each segment
    questions: int = 8  # in each segment

    def sequences(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """A batch of them, segment by segment: tokens, what to answer, and which answers were told in this segment."""
        keys = 1 + torch.rand(BATCH, self.words).argsort(dim=1)[:, : self.segments * self.pairs]
        values = 1 + self.words + torch.randint(self.words, keys.shape)
        told = 2 * self.pairs
        for first in range(0, self.segments * self.pairs, self.pairs):
            new = slice(first, first + self.pairs)
            asked = torch.randint(new.stop, (BATCH, self.questions))
            places = told + torch.rand(BATCH, self.length - told).argsort(dim=1)[:, : self.questions]
            tokens = torch.full((BATCH, self.length), BLANK).scatter(1, places, keys.gather(1, asked))
            tokens[:, :told] = torch.stack([keys[:, new], values[:, new]], dim=-1).flatten(1)
            answers = torch.full_like(tokens, UNASKED).scatter(1, places, values.gather(1, asked))
            recent = torch.zeros_like(tokens, dtype=torch.bool).scatter(1, places, asked >= first)
            yield tokens, answers, recent


class Model(nn.Module):
    """Embedding, short convolution, attention that may remember, and a score for each word."""

    def __init__(self, task: Task, remember: bool) -> None:
        super().__init__()
        self.remember = remember
        words = 1 + 2 * task.words
        self.embedding = nn.Embedding(words, DIM)
        self.convolution = nn.Conv1d(DIM, DIM, kernel_size=2, padding=1)
        self.memory = ContextMemory(DIM, rows=LONGER * task.segments * task.length, heads=2, key_dim=32)
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
        for tokens, answers, _ in task.sequences():
            loss = cross_entropy(model(tokens).mT, answers, ignore_index=UNASKED)
            loss.backward()  # before the next segment, so that no graph but that of one is held
        optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def right_answers(model: Model, task: Task, batches: int = 10) -> tuple[float, float, float]:
    """The share of right answers, in per cent: of all, of those told in the same segment, and of those told earlier."""
    right, recent = [], []
    for _ in range(batches):
        model.memory.reset()
        for tokens, answers, just_told in task.sequences():
            asked = answers != UNASKED
            right.append((model(tokens).argmax(-1) == answers)[asked])
            recent.append(just_told[asked])
    hits, near = 100 * torch.cat(right).float(), torch.cat(recent)
    return hits.mean().item(), hits[near].mean().item(), hits[~near].mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description="Recall what was told segments ago, with a memory and without.")
    parser.add_argument("--small", action="store_true", help="a quick try: shorter sequences, fewer words and steps")
    small = parser.parse_args().small
    task, steps = (Task(segments=4, words=64), 200) if small else (Task(segments=8, words=128), 600)
    torch.manual_seed(0)
    started = time.perf_counter()
    models = {"with memory": train(task, True, steps), "without": train(task, False, steps)}
    print(f"{'right answers, %':<32} {'all':>6} {'same segment':>13} {'earlier one':>12}")
    for tested in (task, replace(task, segments=LONGER * task.segments)):
        for name, model in models.items():
            every, same, earlier = right_answers(model, tested)
            print(f"{f'{tested.segments} segments, {name}':<32} {every:6.2f} {same:13.2f} {earlier:12.2f}")
    print(f"trained on {task.segments} segments of {task.length} tokens, in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
