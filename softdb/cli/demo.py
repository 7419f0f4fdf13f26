"""The tour behind ``softdb demo``: hard and soft answers to everyday sentences, from a real table of word senses."""

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

__all__ = ["Sense", "Senses", "choose", "explanation", "load_senses", "store_of", "tour"]


PARTS_OF_SPEECH = {"n": "noun", "v": "verb", "a": "adjective"}  # by the first letter of a synset


FEATURED = (
    "the river bank was steep",
    "she checked her bank account",
    "a crane stood on one leg in the marsh",
    "water bubbled up from the spring",
)


BANKS = FEATURED[:2]  # the same word, of which each asks for another row


CORRECTED = FEATURED[1]  # the table answers with a verb, and the row that one would rather have comes second


TEMPERATURE = 0.05


TEMPERATURES = (1.0, 0.2, 0.1, 0.07, 0.05, 0.03, 0.02)


LEARNING_RATE = 0.01


TOP = 5


WIDTH = 79  # some terminals wrap when the last of 80 columns is written


BAR_WIDTH = 20


EIGHTHS = " ▏▎▍▌▋▊▉"


FULL = "█"


class Sense(NamedTuple):
    """One meaning of a word.

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
        """Noun, verb or adjective."""
        return PARTS_OF_SPEECH[self.synset[0]]

    @property
    def definition(self) -> str:
        """The gloss without its examples."""
        return self.gloss.split('; "')[0]

    def __str__(self) -> str:
        return f"{self.word} ({self.part_of_speech}): {self.definition}"


@dataclass(frozen=True, eq=False)
class Senses:
    """The packaged word senses and sentences, embedded by one sentence encoder.

    Attributes:
        keys: An embedding of "word: gloss" for each row, (4096, 384) float32, of length 1 each.
        rows: The sense behind each key.
        queries: An embedding of each sentence, (32, 384) float32, of length 1 each.
        sentences: The sentence behind each query.
    """

    keys: Tensor
    rows: tuple[Sense, ...]
    queries: Tensor
    sentences: tuple[str, ...]

    def query(self, sentence: str) -> Tensor:
        """The embedding of one of the sentences, (384,)."""
        return self.queries[self.sentences.index(sentence)]

    def parts_of_speech(self) -> Tensor:
        """Each row's part of speech, one-hot in the order of `PARTS_OF_SPEECH`, (4096, 3) float32."""
        letters = list(PARTS_OF_SPEECH)
        numbers = torch.tensor([letters.index(row.synset[0]) for row in self.rows], device="cpu")
        return torch.nn.functional.one_hot(numbers, len(letters)).float()


@functools.cache
def load_senses() -> Senses:
    """The packaged senses, read once a process: callers share the tensors and must not write into them."""
    folder = resources.files("softdb") / "data"
    tensors = safetensors.torch.load((folder / "senses.safetensors").read_bytes())
    texts = json.loads((folder / "senses.json").read_text(encoding="utf-8"))
    return Senses(
        keys=tensors["keys"].float(),
        rows=tuple(Sense(**row) for row in texts["rows"]),
        queries=tensors["queries"].float(),
        sentences=tuple(texts["queries"]),
    )


def store_of(senses: Senses, *, trainable: bool = False) -> SoftKVStore:
    """A store of the senses, each with its part of speech; its ids, 0, 1, 2, ..., are positions in ``senses.rows``."""
    widths = senses.keys.shape[1], len(PARTS_OF_SPEECH)
    store = SoftKVStore(*widths, metric="cosine", temperature=TEMPERATURE, trainable=trainable, device="cpu")
    store.add(senses.keys, senses.parts_of_speech())
    return store


def explanation(sentences: Sequence[str]) -> lab.Explanation:
    """Which senses answer some of the packaged sentences."""
    senses = load_senses()
    queries = torch.stack([senses.query(sentence) for sentence in sentences])
    labels = [str(row) for row in senses.rows]
    return lab.explain(store_of(senses), queries, labels, query_labels=sentences)


def choose(words: Sequence[str]) -> tuple[str, ...]:
    """The packaged sentences that contain one of ``words``; a few telling ones if no words are given.

    Args:
        words: Each a word, or several in one string, all of which a sentence must contain.

    Raises:
        ArgumentError: No sentence contains one of them; the message lists the sentences.
    """
    if not words:
        return FEATURED
    sentences = load_senses().sentences
    chosen: set[str] = set()
    for word in words:
        wanted = _tokens(word)
        matching = {sentence for sentence in sentences if wanted and wanted <= _tokens(sentence)}
        if not matching:
            listed = "\n".join(f"  {sentence}" for sentence in sentences)
            raise ArgumentError(f"no sentence here contains {word!r}. Try a word of one of these:\n{listed}")
        chosen |= matching
    return tuple(sentence for sentence in sentences if sentence in chosen)


def _tokens(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))


def tour(sentences: Sequence[str], *, blocks: bool = True) -> Iterator[str]:
    """The lines of the tour, each fit for 80 columns.

    Args:
        sentences: Which of the packaged sentences to ask, at least one.
        blocks: Whether bars are drawn with Unicode's block elements, else with "#".
    """
    started = time.perf_counter()
    senses = load_senses()
    store = store_of(senses, trainable=True)
    yield from _introduction(senses)
    for sentence in sentences:
        yield from _answers(store, senses, sentence, blocks)
    yield from _cooling(store, senses, sentences[0])
    yield from _step(store, senses, CORRECTED if CORRECTED in sentences else sentences[0], blocks)
    yield ""
    yield f"All this took {time.perf_counter() - started:.1f} s."


def _introduction(senses: Senses) -> Iterator[str]:
    yield "softdb: a table that answers softly"
    yield ""
    yield from _paragraph(
        "A query is compared with the key of every row. The answer is a blend of the rows' values, each weighted by "
        "how well its key matched. In this demo they are:"
    )
    yield ""
    yield "  query   what is looked for: a sentence, as 384 numbers that hold its meaning"
    yield "  key     what a row is found by: a word with its definition, as 384 numbers"
    yield "  value   what a row hands over: here just noun, verb or adjective"
    yield ""
    yield from _paragraph(
        f"The table has {len(senses.rows):,} rows, senses of words from WordNet 3.0. A match is the cosine between "
        f"query and key, divided by a temperature, here {TEMPERATURE}; a softmax turns matches into weights."
    )


def _answers(store: SoftKVStore, senses: Senses, sentence: str, blocks: bool) -> Iterator[str]:
    query = senses.query(sentence)
    with torch.no_grad():
        hard = store.read(query, mode="hard")
        soft = store.read(query, k=TOP)
    best = senses.rows[_top(hard)[0][0]]
    yield ""
    yield f'"{sentence}"'
    yield from _paragraph(f"{best} [{best.synset}]", first="  hard answer  ")
    yield "  soft answer  a blend of all rows; these five weigh most:"
    yield from _bars(soft, senses, blocks)
    yield from _paragraph(
        f"the five hold {_percent(float(soft.mass))} of the weight; in effect "
        f"{_effective_rows(store, query, TEMPERATURE):,.1f} rows answer",
        first=f"  of all {len(store):,} ",
    )
    yield f"  the blend    {_blend(soft)}"


def _cooling(store: SoftKVStore, senses: Senses, sentence: str) -> Iterator[str]:
    query = senses.query(sentence)
    yield ""
    yield "FROM SOFT TO HARD"
    yield ""
    yield from _paragraph(
        f'A high temperature weighs all rows alike; a low one leaves only the best. For "{sentence}":'
    )
    yield ""
    yield "  temperature   best row   top five   effective rows   soft - hard"
    with torch.no_grad():
        hard = store.read(query, mode="hard")
        for temperature in TEMPERATURES:
            soft = store.read(query, k=TOP, temperature=temperature)
            best, five = _percent(_top(soft)[1].tolist()[0]), _percent(float(soft.mass))
            rows = _effective_rows(store, query, temperature)
            distance = float((soft.values - hard.values).norm())
            yield f"  {temperature:11g}   {best:>8}   {five:>8}   {rows:14,.1f}   {distance:11.3f}"
    yield ""
    yield from _paragraph(
        "Best row, top five: their share of the weight. Effective rows: so many rows of equal weight would be as "
        "spread out (exp of the entropy). Soft - hard: the distance from the blend to the best row's value."
    )


def _step(store: SoftKVStore, senses: Senses, sentence: str, blocks: bool) -> Iterator[str]:
    query = senses.query(sentence)
    others = senses.queries[[other != sentence for other in senses.sentences]]
    with torch.no_grad():
        best_before, _ = _top(store.read(others, mode="hard"))

    before = store.read(query, k=TOP)
    ids, weights = _top(before)
    loss = -weights[1].log()
    (gradient,) = torch.autograd.grad(loss, [store.keys])
    # A step of torch.optim.SGD, by hand: importing what that needs takes longer than the whole tour.
    store.update(store.ids, keys=store.keys - LEARNING_RATE * gradient)

    with torch.no_grad():
        after = store.read(query, k=TOP)
        best_after, _ = _top(store.read(others, mode="hard"))
    wanted = ids[1]
    kept = sum(old == new for old, new in zip(best_before, best_after, strict=True))
    yield ""
    yield "ONE STEP OF LEARNING"
    yield ""
    yield from _paragraph(
        f'Say that for "{sentence}" we want the second row, {senses.rows[wanted]}. Loss: -log of its weight. The '
        "gradient goes back through the lookup into the keys, and one step of gradient descent moves them. (> marks "
        "the row.)"
    )
    yield ""
    yield "  before"
    yield from _bars(before, senses, blocks, wanted)
    yield f"  the blend    {_blend(before)}"
    yield "  after"
    yield from _bars(after, senses, blocks, wanted)
    yield f"  the blend    {_blend(after)}"
    yield ""
    yield from _paragraph(
        f"Of the {len(others)} other sentences that come with the demo, {kept} keep their best row: "
        "the step moved almost only the keys that this sentence had matched."
    )


def _top(read: Read) -> tuple[list[int], Tensor]:
    """The rows that a read reports and their weights, best first; for a batch of one row each, one after the other."""
    if read.ids is None or read.weights is None:
        raise ArgumentError("read: expected one that reports its rows; read with k")
    return read.ids.flatten().tolist(), read.weights.flatten()


def _effective_rows(store: SoftKVStore, query: Tensor, temperature: float) -> float:
    with torch.no_grad():
        _, weights = _top(store.read(query, k=len(store), temperature=temperature))
    return float(torch.special.entr(weights).sum().exp())


def _bars(read: Read, senses: Senses, blocks: bool, marked: int | None = None) -> Iterator[str]:
    ids, weights = _top(read)
    for row, weight in zip(ids, weights.tolist(), strict=True):
        mark = ">" if row == marked else " "
        start = f"  {mark} {_percent(weight):>5}  {_bar(weight, blocks)}  "
        yield start + textwrap.shorten(str(senses.rows[row]), WIDTH - len(start), placeholder="...")


def _bar(share: float, blocks: bool) -> str:
    """A bar for a share of 1, padded to `BAR_WIDTH` columns."""
    if not blocks:
        return ("#" * round(share * BAR_WIDTH)).ljust(BAR_WIDTH)
    whole, eighths = divmod(round(share * BAR_WIDTH * 8), 8)
    return (FULL * whole + EIGHTHS[eighths].strip()).ljust(BAR_WIDTH)


def _blend(read: Read) -> str:
    named = zip(PARTS_OF_SPEECH.values(), read.values.tolist(), strict=True)
    return ", ".join(f"{name} {_percent(share)}" for name, share in named)


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _paragraph(text: str, first: str = "") -> Iterator[str]:
    yield from textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=" " * len(first))
