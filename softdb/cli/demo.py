"""Tour of ``softdb demo``: hard and soft reads of a store of word senses."""

from __future__ import annotations

import functools
import json
import re
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from softdb import lab
from softdb.errors import ArgumentError
from softdb.reading.result import Read
from softdb.store import SoftKVStore

__all__ = ["Sense", "Senses", "build_store", "choose_sentences", "explain_sentences", "load_senses", "run_tour"]


PARTS_OF_SPEECH = {"n": "noun", "v": "verb", "a": "adjective"}  # by the first letter of a synset


FEATURED_SENTENCES = (
    "the river bank was steep",
    "she checked her bank account",
    "a crane stood on one leg in the marsh",
    "water bubbled up from the spring",
)


BANK_SENTENCES = FEATURED_SENTENCES[:2]  # the same word with two meanings


# The best row is a verb; the wanted row, a noun, is the second best.
CORRECTED_SENTENCE = FEATURED_SENTENCES[1]


TEMPERATURE = 0.05


TEMPERATURES = (1.0, 0.2, 0.1, 0.07, 0.05, 0.03, 0.02)


LEARNING_RATE = 0.01


REPORTED_ROWS = 5


LINE_CHARACTERS = 79  # some terminals wrap when the last of 80 columns is written


BAR_CHARACTERS = 20


EIGHTH_BLOCKS = " ▏▎▍▌▋▊▉"


FULL_BLOCK = "█"


class Sense(NamedTuple):
    """Meaning of a word in WordNet.

    Attributes:
        word: The word.
        synset: Its WordNet 3.0 synset, as in "n09213565".
        gloss: Its definition, often followed by examples in quotes.
    """

    word: str
    synset: str
    gloss: str

    @property
    def part_of_speech(self) -> str:
        """Part of speech: "noun", "verb" or "adjective"."""
        return PARTS_OF_SPEECH[self.synset[0]]

    @property
    def definition(self) -> str:
        """Gloss without its examples."""
        return self.gloss.split('; "')[0]

    def __str__(self) -> str:
        return f"{self.word} ({self.part_of_speech}): {self.definition}"


@dataclass(frozen=True, eq=False)
class Senses:
    """Word senses and sentences in the package, embedded by one sentence encoder.

    Attributes:
        keys: Embeddings of "word: gloss", (4096, 384) float32, of norm 1.
        rows: The sense of each key.
        queries: Embeddings of the sentences, (32, 384) float32, of norm 1.
        sentences: The sentence of each query.
    """

    keys: Tensor
    rows: tuple[Sense, ...]
    queries: Tensor
    sentences: tuple[str, ...]

    def query(self, sentence: str) -> Tensor:
        """Return the embedding of a sentence, (384,)."""
        return self.queries[self.sentences.index(sentence)]

    def parts_of_speech(self) -> Tensor:
        """Return the parts of speech of the rows, one-hot, (4096, 3) float32.

        The columns are in the order of `PARTS_OF_SPEECH`.
        """
        letters = list(PARTS_OF_SPEECH)
        numbers = torch.tensor([letters.index(row.synset[0]) for row in self.rows], device="cpu")
        return torch.nn.functional.one_hot(numbers, len(letters)).float()


@functools.cache
def load_senses() -> Senses:
    """Load the word senses of the package, once per process.

    Callers share the tensors and must not change them.
    """
    folder = resources.files("softdb") / "data"
    tensors = safetensors.torch.load((folder / "senses.safetensors").read_bytes())
    texts = json.loads((folder / "senses.json").read_text(encoding="utf-8"))
    return Senses(
        keys=tensors["keys"].float(),
        rows=tuple(Sense(**row) for row in texts["rows"]),
        queries=tensors["queries"].float(),
        sentences=tuple(texts["queries"]),
    )


def build_store(senses: Senses, *, trainable: bool = False) -> SoftKVStore:
    """Build a store with the senses as keys and their parts of speech as values.

    The ids are positions in ``senses.rows``.
    """
    widths = senses.keys.shape[1], len(PARTS_OF_SPEECH)
    store = SoftKVStore(*widths, metric="cosine", temperature=TEMPERATURE, trainable=trainable, device="cpu")
    store.add(senses.keys, senses.parts_of_speech())
    return store


def explain_sentences(sentences: Sequence[str]) -> lab.Explanation:
    """Explain the answers to some of the packaged sentences."""
    senses = load_senses()
    queries = torch.stack([senses.query(sentence) for sentence in sentences])
    labels = [str(row) for row in senses.rows]
    return lab.explain(build_store(senses), queries, labels, query_labels=sentences)


def choose_sentences(words: Sequence[str]) -> tuple[str, ...]:
    """Choose the packaged sentences that contain at least one of ``words``.

    Args:
        words: Strings of one or more words. A sentence matches a string if it contains all its words. If there are no
            strings, some examples are chosen.

    Raises:
        ArgumentError: No sentence matches one of the strings; the message lists the sentences.
    """
    if not words:
        return FEATURED_SENTENCES
    sentences = load_senses().sentences
    chosen: set[str] = set()
    for word in words:
        wanted = _tokens(word)
        matching = {sentence for sentence in sentences if wanted and wanted <= _tokens(sentence)}
        if not matching:
            listed = "\n".join(f"  {sentence}" for sentence in sentences)
            raise ArgumentError(f"word: expected a word of the sentences below, got {word!r}\n{listed}")
        chosen |= matching
    return tuple(sentence for sentence in sentences if sentence in chosen)


def _tokens(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))


def run_tour(sentences: Sequence[str], *, blocks: bool = True) -> Iterator[str]:
    """Yield the lines of the tour, which fit a terminal of 80 columns.

    Args:
        sentences: Some of the packaged sentences, at least one.
        blocks: Whether to draw bars with Unicode block elements instead of "#".
    """
    started = time.perf_counter()
    senses = load_senses()
    store = build_store(senses, trainable=True)
    yield from _introduce(senses)
    for sentence in sentences:
        yield from _show_answers(store, senses, sentence, blocks)
    yield from _show_temperatures(store, senses, sentences[0])
    yield from _show_training_step(
        store, senses, CORRECTED_SENTENCE if CORRECTED_SENTENCE in sentences else sentences[0], blocks
    )
    yield ""
    yield f"The tour took {time.perf_counter() - started:.1f} s."


def _introduce(senses: Senses) -> Iterator[str]:
    yield "softdb: a soft key-value store"
    yield ""
    yield from _wrap(
        "A read scores the key of every row against a query. The answer is a blend of the rows' values, weighted by "
        "the softmax of the scores. In this demo:"
    )
    yield ""
    yield "  query   the embedding of a sentence, 384 numbers"
    yield "  key     the embedding of a word with its definition, 384 numbers"
    yield "  value   the part of speech: noun, verb or adjective"
    yield ""
    yield from _wrap(
        f"The store has {len(senses.rows):,} rows, word senses from WordNet 3.0. A score is the cosine similarity of "
        f"query and key, divided by the temperature {TEMPERATURE}."
    )


def _show_answers(store: SoftKVStore, senses: Senses, sentence: str, blocks: bool) -> Iterator[str]:
    query = senses.query(sentence)
    with torch.no_grad():
        hard = store.read(query, mode="hard")
        soft = store.read(query, k=REPORTED_ROWS)
    best = senses.rows[_flatten_rows(hard)[0][0]]
    yield ""
    yield f'"{sentence}"'
    yield from _wrap(f"{best} [{best.synset}]", first="  hard answer  ")
    yield "  soft answer  a blend of all rows; the five with the highest weight are:"
    yield from _draw_bars(soft, senses, blocks)
    yield from _wrap(
        f"the five rows hold {_format_percent(float(soft.mass))} of the weight; "
        f"{_compute_effective_rows(store, query, TEMPERATURE):,.1f} effective rows",
        first=f"  of all {len(store):,} ",
    )
    yield f"  the blend    {_format_blend(soft)}"


def _show_temperatures(store: SoftKVStore, senses: Senses, sentence: str) -> Iterator[str]:
    query = senses.query(sentence)
    yield ""
    yield "FROM SOFT TO HARD"
    yield ""
    yield from _wrap(
        "At a high temperature all rows have similar weights; at a low temperature the best row has all weight. For "
        f'"{sentence}":'
    )
    yield ""
    yield "  temperature   best row   top five   effective rows   soft - hard"
    with torch.no_grad():
        hard = store.read(query, mode="hard")
        for temperature in TEMPERATURES:
            soft = store.read(query, k=REPORTED_ROWS, temperature=temperature)
            best, five = _format_percent(_flatten_rows(soft)[1].tolist()[0]), _format_percent(float(soft.mass))
            rows = _compute_effective_rows(store, query, temperature)
            distance = float((soft.values - hard.values).norm())
            yield f"  {temperature:11g}   {best:>8}   {five:>8}   {rows:14,.1f}   {distance:11.3f}"
    yield ""
    yield from _wrap(
        "Best row, top five: fraction of the weight that they hold. Effective rows: exp(entropy of the weights), which "
        "is n for n rows of equal weight. Soft - hard: distance from the blend to the value of the best row."
    )


def _show_training_step(store: SoftKVStore, senses: Senses, sentence: str, blocks: bool) -> Iterator[str]:
    query = senses.query(sentence)
    others = senses.queries[[other != sentence for other in senses.sentences]]
    with torch.no_grad():
        best_before, _ = _flatten_rows(store.read(others, mode="hard"))

    before = store.read(query, k=REPORTED_ROWS)
    ids, weights = _flatten_rows(before)
    loss = -weights[1].log()
    (gradient,) = torch.autograd.grad(loss, [store.keys])
    # A step of SGD. Importing torch.optim takes longer than the tour.
    store.update(store.ids, keys=store.keys - LEARNING_RATE * gradient)

    with torch.no_grad():
        after = store.read(query, k=REPORTED_ROWS)
        best_after, _ = _flatten_rows(store.read(others, mode="hard"))
    wanted = ids[1]
    kept = sum(old == new for old, new in zip(best_before, best_after, strict=True))
    yield ""
    yield "ONE TRAINING STEP"
    yield ""
    yield from _wrap(
        f'The wanted row for "{sentence}" is the second one, {senses.rows[wanted]}. The loss is -log of its weight. '
        "Its gradient reaches the keys, and one step of gradient descent updates them. (> marks the wanted row.)"
    )
    yield ""
    yield "  before"
    yield from _draw_bars(before, senses, blocks, wanted)
    yield f"  the blend    {_format_blend(before)}"
    yield "  after"
    yield from _draw_bars(after, senses, blocks, wanted)
    yield f"  the blend    {_format_blend(after)}"
    yield ""
    yield from _wrap(
        f"{kept} of the {len(others)} other sentences of the demo keep their best row: the step changed mainly the "
        "keys with a high weight for this sentence."
    )


def _flatten_rows(read: Read) -> tuple[list[int], Tensor]:
    """Return the reported ids and their weights, flattened over queries."""
    if read.ids is None or read.weights is None:
        raise ArgumentError("read: expected a read that reports ids and weights, got one without them; pass k")
    return read.ids.flatten().tolist(), read.weights.flatten()


def _compute_effective_rows(store: SoftKVStore, query: Tensor, temperature: float) -> float:
    with torch.no_grad():
        _, weights = _flatten_rows(store.read(query, k=len(store), temperature=temperature))
    return float(torch.special.entr(weights).sum().exp())


def _draw_bars(read: Read, senses: Senses, blocks: bool, marked: int | None = None) -> Iterator[str]:
    ids, weights = _flatten_rows(read)
    for row, weight in zip(ids, weights.tolist(), strict=True):
        mark = ">" if row == marked else " "
        start = f"  {mark} {_format_percent(weight):>5}  {_draw_bar(weight, blocks)}  "
        yield start + textwrap.shorten(str(senses.rows[row]), LINE_CHARACTERS - len(start), placeholder="...")


def _draw_bar(share: float, blocks: bool) -> str:
    """Draw a bar for a fraction, padded to `BAR_CHARACTERS` columns."""
    if not blocks:
        return ("#" * round(share * BAR_CHARACTERS)).ljust(BAR_CHARACTERS)
    whole, eighths = divmod(round(share * BAR_CHARACTERS * 8), 8)
    return (FULL_BLOCK * whole + EIGHTH_BLOCKS[eighths].strip()).ljust(BAR_CHARACTERS)


def _format_blend(read: Read) -> str:
    named = zip(PARTS_OF_SPEECH.values(), read.values.tolist(), strict=True)
    return ", ".join(f"{name} {_format_percent(share)}" for name, share in named)


def _format_percent(share: float) -> str:
    return f"{share:.1%}"


def _wrap(text: str, first: str = "") -> Iterator[str]:
    yield from textwrap.wrap(text, LINE_CHARACTERS, initial_indent=first, subsequent_indent=" " * len(first))
