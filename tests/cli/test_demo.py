"""Test the packaged word senses, and the tour of ``softdb demo``."""

from __future__ import annotations

import re

import pytest
import torch

from softdb import SoftKVStore
from softdb.cli.demo import FEATURED_SENTENCES, choose_sentences, load_senses, run_tour
from softdb.errors import ArgumentError

RIVER, ACCOUNT = "the river bank was steep", "she checked her bank account"


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return list(run_tour(FEATURED_SENTENCES))


def section(lines: list[str], first: str, last: str | None = None) -> list[str]:
    """Return the lines after ``first``, up to ``last`` or the next empty line."""
    start = lines.index(first) + 1
    rest = lines[start:]
    return rest[: rest.index(last if last is not None else "")]


def weights(lines: list[str]) -> list[tuple[float, str]]:
    """Return the weight in percent and the label of each line with a bar."""
    found = [re.match(r"  [ >] +([\d.]+)%  [\W_]*(\w.*)", line.replace("#", " ")) for line in lines]
    return [(float(match[1]), match[2]) for match in found if match]


# -- the packaged rows ------------------------------------------------------------------------------------------------


def test_the_packaged_rows_are_complete() -> None:
    senses = load_senses()
    assert senses.keys.shape == (4096, 384)
    assert senses.queries.shape == (32, 384)
    assert len(senses.rows) == 4096
    assert len(senses.sentences) == 32
    assert senses.keys.dtype == senses.queries.dtype == torch.float32
    for table in (senses.keys, senses.queries):
        torch.testing.assert_close(table.norm(dim=-1), torch.ones(len(table)), atol=1e-3, rtol=0)


def test_the_rows_are_loaded_once() -> None:
    assert load_senses() is load_senses()


def test_a_sense_has_a_word_a_part_of_speech_and_a_definition() -> None:
    senses = load_senses()
    bank = next(row for row in senses.rows if row.synset == "n09213565")
    assert bank.word == "bank"
    assert bank.part_of_speech == "noun"
    assert bank.gloss.startswith(bank.definition)
    assert bank.definition.startswith("sloping land (especially the slope ")
    assert str(bank) == f"bank (noun): {bank.definition}"


def test_parts_of_speech_are_one_hot() -> None:
    senses = load_senses()
    values = senses.parts_of_speech()
    assert values.shape == (4096, 3)
    assert torch.equal(values.sum(-1), torch.ones(4096))
    first_verb = next(i for i, row in enumerate(senses.rows) if row.part_of_speech == "verb")
    assert values[first_verb].tolist() == [0.0, 1.0, 0.0]


# -- sentences --------------------------------------------------------------------------------------------------------


def test_no_words_choose_the_featured_sentences() -> None:
    assert choose_sentences([]) == FEATURED_SENTENCES
    assert FEATURED_SENTENCES[:2] == (RIVER, ACCOUNT)


def test_words_choose_the_sentences_that_contain_one_of_them() -> None:
    assert choose_sentences(["seal", "bark"]) == (
        "the seal barked on the rocks",
        "the king pressed his seal into the wax",
        "the dog's bark woke the neighbours",
        "the bark of the birch is white",
    )


def test_a_sentence_must_contain_all_words_of_a_string() -> None:
    assert choose_sentences(["River BANK"]) == (RIVER,)


@pytest.mark.parametrize("word", ["zebra", "ban", "river account", "", "!?"])
def test_an_unknown_word_lists_the_sentences(word: str) -> None:
    with pytest.raises(ArgumentError, match="word: expected a word of the sentences below") as caught:
        choose_sentences(["bank", word])
    assert all(sentence in str(caught.value) for sentence in load_senses().sentences)


# -- the tour ---------------------------------------------------------------------------------------------------------


def test_the_tour_explains_query_key_and_value(lines: list[str]) -> None:
    for word in ("query", "key", "value"):
        assert any(line.startswith(f"  {word} ") for line in lines)


def test_the_river_bank_is_sloping_land(lines: list[str]) -> None:
    answer = " ".join(section(lines, f'"{RIVER}"'))
    assert "hard answer  bank (noun): sloping land" in answer
    assert "[n09213565]" in answer


def test_the_bank_account_is_about_money(lines: list[str]) -> None:
    answer = section(lines, f'"{ACCOUNT}"')
    assert "hard answer  bank (verb): put into a bank account [v02310873]" in answer[0]
    assert any("bank (noun): a financial institution" in line for line in answer)


@pytest.mark.parametrize("sentence", FEATURED_SENTENCES)
def test_bars_show_the_weights_of_the_store(lines: list[str], sentence: str) -> None:
    senses = load_senses()
    store = SoftKVStore(384, 3, metric="cosine", temperature=0.05)
    store.add(senses.keys, senses.parts_of_speech())
    read = store.read(senses.query(sentence), k=5)
    assert read.ids is not None
    assert read.weights is not None
    answer = section(lines, f'"{sentence}"')
    shown = weights(answer)
    assert [word.split(" (")[0] for _, word in shown] == [senses.rows[row].word for row in read.ids.tolist()]
    assert [weight for weight, _ in shown] == pytest.approx((100 * read.weights).tolist(), abs=0.051)
    assert f"the five rows hold {float(read.mass):.1%}" in " ".join(answer)


def test_lower_temperatures_concentrate_the_weight(lines: list[str]) -> None:
    table = section(lines, "  temperature   best row   top five   effective rows   soft - hard")
    numbers = [[float(word.strip("%").replace(",", "")) for word in line.split()] for line in table]
    temperature, best, five, rows, distance = (list(column) for column in zip(*numbers, strict=True))
    assert temperature == sorted(temperature, reverse=True)
    assert best == sorted(best)
    assert five == sorted(five)
    assert rows == sorted(rows, reverse=True)
    assert rows[0] > 4000
    assert rows[-1] == pytest.approx(1.0, abs=0.1)
    assert distance[0] > 0.3
    assert distance[-1] < 0.01


@pytest.mark.parametrize("sentences", [FEATURED_SENTENCES, (RIVER,)])
def test_one_training_step_increases_the_weight_of_the_wanted_row(sentences: tuple[str, ...]) -> None:
    lines = list(run_tour(sentences))
    before = weights([line for line in section(lines, "  before", "  after") if line.startswith("  >")])
    after = weights([line for line in section(lines, "  after") if line.startswith("  >")])
    assert before[0][1].split(" (")[0] == after[0][1].split(" (")[0]
    assert after[0][0] > before[0][0] + 10


def test_the_training_step_makes_the_financial_institution_the_best_row(lines: list[str]) -> None:
    after = section(lines, "  after")
    assert after[0].startswith("  >")
    assert "bank (noun): a financial institution" in after[0]


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [True, False])
def test_all_sentences_fit_80_columns(blocks: bool) -> None:
    lines = list(run_tour(load_senses().sentences, blocks=blocks))
    assert max(map(len, lines)) < 80
    assert all(line.isascii() for line in lines) is not blocks


def test_the_length_of_bars_is_proportional_to_the_weight() -> None:
    lines = list(run_tour([RIVER], blocks=False))
    bars = [line.count("#") for line in section(lines, f'"{RIVER}"') if "%  " in line and "blend" not in line]
    assert bars[0] == 17  # 87.4 % of 20
    assert bars == sorted(bars, reverse=True)


def test_the_tour_does_not_change_shared_rows() -> None:
    before = load_senses().keys.clone()
    list(run_tour([RIVER]))
    assert torch.equal(load_senses().keys, before)
