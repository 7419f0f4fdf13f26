"""Test the file that `write_page` writes, and the page in a browser."""

from __future__ import annotations

import html.parser
import json
import math
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select
from selenium.webdriver.support.wait import WebDriverWait

from softdb import MissingPackageError, SoftKVStore, lab
from softdb.errors import ArgumentError, DtypeError, ShapeError
from softdb.lab import page, page_explorer
from softdb.lab.page import write_page
from softdb.lab.page_explorer import PageSizes

SECONDS = 10
ROWS, WIDTH = 200, 8
NASTY = '</script><script>window.broken = 1</script> <b>bold</b> & "quoted" %{x}'


def make_store(rows: int = ROWS, value_dim: int = 3, metric: Any = "dot", temperature: float = 0.7) -> SoftKVStore:
    generator = torch.Generator().manual_seed(0)
    store = SoftKVStore(WIDTH, value_dim, metric=metric, temperature=temperature)
    keys, values = (torch.randn(rows, width, generator=generator) for width in (WIDTH, value_dim))
    store.add(keys, values, ids=torch.arange(rows) * 3 + 1)
    return store


def make_queries(count: int = 3) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(1))


def measurements() -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {
        name: [] for name in ("mode", "normalizer", "temperature", "k", "distance", "mass", "accuracy")
    }
    for normalizer in ("softmax", "entmax15"):
        for temperature in (0.1, 1.0):
            for mode, k in (("hard", None), ("topk", 4), ("topk", 16), ("exact", None)):
                distance = {"hard": 0.9, "exact": 0.0}.get(mode, temperature / (k or 1))
                entries = (mode, normalizer, temperature, k, distance, 0.5 if mode == "topk" else 1.0, 1 - distance / 2)
                for name, entry in zip(columns, entries, strict=True):
                    columns[name].append(entry)
    return columns


class _Parts(html.parser.HTMLParser):
    """Tags of a page with their attributes, and the text of each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.within = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.within = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.within = ""

    def handle_data(self, data: str) -> None:
        if self.within == "script":
            self.scripts[-1] += data


def embedded(path: Path) -> Any:
    return json.loads(_Parts(path.read_text(encoding="utf-8")).scripts[0])


def weigh_as_page(query: Any, temperature: float, k: int | None) -> tuple[list[float], float]:
    """Compute weights and effective rows by the formula of the page's script."""
    rows = [math.exp(-gap / temperature) for gap in query["gaps"][:k]]
    rows += [0.0] * (len(query["gaps"]) - len(rows))
    tail = zip(query["tail"]["counts"], query["tail"]["gaps"], strict=True)
    bins = [(n * math.exp(-gap / temperature), gap) for n, gap in tail] if k is None else []
    total = sum(rows) + sum(weight for weight, _ in bins)
    energy = sum(w * gap for w, gap in [*zip(rows, query["gaps"], strict=True), *bins])
    return [weight / total for weight in rows], math.exp(math.log(total) + energy / total / temperature)


# -- the file ---------------------------------------------------------------------------------------------------------


def test_the_file_needs_no_network(tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", make_store(), make_queries(), columns=measurements(), metric="accuracy")
    parts = _Parts((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert not {tag for tag, _ in parts.tags} & {"link", "img", "iframe", "a", "base", "object", "embed"}
    assert not any(name in attributes for _, attributes in parts.tags for name in ("src", "href", "srcset", "action"))
    policy = next(a["content"] for tag, a in parts.tags if tag == "meta" and "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert len(parts.scripts) == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize("metric", ["dot", "l2"])
def test_the_numbers_equal_those_of_the_store(tmp_path: Path, metric: str) -> None:
    store, queries = make_store(metric=metric), make_queries()
    write_page(tmp_path / "page.html", store, queries)
    data = embedded(tmp_path / "page.html")
    read = store.read(queries, "exact", k=ROWS)
    assert read.ids is not None
    assert read.scores is not None
    assert read.weights is not None
    for place, query in enumerate(data["queries"]):
        gaps = torch.tensor(query["gaps"], dtype=torch.float64)
        scores = read.scores[place].double() * 0.7
        torch.testing.assert_close(gaps, scores[0] - scores, rtol=6e-5, atol=1e-5)
        assert query["best"] == pytest.approx(float(scores[0]), rel=1e-6)
        assert query["labels"] == [f"row {id}" for id in read.ids[place, : page_explorer.MAX_BARS].tolist()]
        values = torch.tensor([data["values"][row] for row in query["rows"]])
        torch.testing.assert_close(values, store.get(read.ids[place]).values, rtol=1e-4, atol=1e-5)
        weights, _ = weigh_as_page(query, 0.7, None)
        torch.testing.assert_close(torch.tensor(weights), read.weights[place], rtol=1e-3, atol=1e-6)
    assert data["rows"] == ROWS
    assert data["temperature"] in data["temperatures"]
    assert data["temperatures"] == sorted(data["temperatures"], reverse=True)
    assert data["temperatures"][-1] == 0
    assert data["ks"][:3] == [1, 2, 3]
    assert data["ks"][-1] is None


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_the_histogram_has_the_weight_of_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offset: float
) -> None:
    monkeypatch.setattr(PageSizes, "usual", lambda: PageSizes(numbers=1000))
    store, queries = make_store(20_000), make_queries(2)
    if offset:  # one score far above the others, and one far below
        store.update(store.ids[:2], keys=torch.stack([queries[0] * 10, queries[0] * -1000]))
    write_page(tmp_path / "page.html", store, queries)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "The page has the scores of the 256 best rows" in text
    data = embedded(tmp_path / "page.html")
    for place, query in enumerate(data["queries"]):
        assert len(query["gaps"]) == PageSizes().fewest_rows
        assert sum(query["tail"]["counts"]) == 20_000 - PageSizes().fewest_rows
        assert len(query["tail"]["counts"]) <= page_explorer.HISTOGRAM_BINS
        assert max(k for k in data["ks"] if k) <= PageSizes().fewest_rows
        scores = (store.get(store.ids).keys.double() @ queries[place].double()).sort(descending=True).values
        for temperature in data["temperatures"][:-1]:
            exact = (scores / temperature).softmax(0)
            weights, effective = weigh_as_page(query, temperature, None)
            best = exact[: PageSizes().fewest_rows]
            torch.testing.assert_close(torch.tensor(weights, dtype=torch.float64), best, rtol=2e-3, atol=1e-6)
            assert effective == pytest.approx(float(torch.special.entr(exact).sum().exp()), rel=5e-3)


def test_the_histogram_has_the_values_of_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PageSizes, "usual", lambda: PageSizes(numbers=1000))
    store, query = make_store(5000), make_queries(1)
    write_page(tmp_path / "page.html", store, query)
    data = embedded(tmp_path / "page.html")
    (found,) = data["queries"]
    for temperature in (0.3, 1.0, 10.0):
        weights, _ = weigh_as_page(found, temperature, None)
        scale = weights[0]  # of the best row, whose gap is 0
        tail = zip(found["tail"]["counts"], found["tail"]["gaps"], found["tail"]["values"], strict=True)
        terms = [(scale * n * math.exp(-gap / temperature), value) for n, gap, value in tail]
        terms += [(weight, data["values"][row]) for weight, row in zip(weights, found["rows"], strict=True)]
        blend = sum(weight * torch.tensor(value) for weight, value in terms)
        torch.testing.assert_close(blend, store.read(query, temperature=temperature).values[0], rtol=0, atol=5e-3)


def test_labels_are_escaped(tmp_path: Path) -> None:
    store = make_store(4)
    names, entries = dict.fromkeys(store.ids.tolist(), NASTY), ["{{data}}", NASTY, "c"]
    write_page(
        tmp_path / "page.html",
        store,
        make_queries(1),
        labels=names,
        query_labels=[NASTY],
        title=NASTY,
        value_labels=entries,
    )
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<b>bold" not in text
    parts = _Parts(text)
    assert len(parts.scripts) == 3
    data = json.loads(parts.scripts[0])
    assert data["queries"][0]["labels"] == [NASTY] * 4
    assert data["value_labels"] == entries


def test_labels_are_in_order_or_by_id(tmp_path: Path) -> None:
    store, query = make_store(3), make_queries(1)
    ids = store.read(query, "exact", k=3).ids
    assert ids is not None
    order = ids.flatten().tolist()
    write_page(tmp_path / "page.html", store, query, labels={order[1]: "the second"})
    labels = embedded(tmp_path / "page.html")["queries"][0]["labels"]
    assert labels == [f"row {order[0]}", "the second", f"row {order[2]}"]
    write_page(tmp_path / "page.html", store, query, labels=[f"is {id}" for id in store.ids.tolist()])
    assert embedded(tmp_path / "page.html")["queries"][0]["labels"] == [f"is {id}" for id in order]


@pytest.mark.parametrize("rows", [1, 2, 13])
@pytest.mark.parametrize("value_dim", [1, 12, 13])
def test_small_stores_and_wide_values_have_pages(tmp_path: Path, rows: int, value_dim: int) -> None:
    write_page(tmp_path / "page.html", make_store(rows, value_dim), make_queries(1)[0])
    data = embedded(tmp_path / "page.html")
    assert len(data["value_labels"]) == (value_dim if value_dim <= 12 else 0)
    assert len(data["queries"][0]["gaps"]) == rows
    assert data["ks"] == [*range(1, rows), None]
    assert all(math.isfinite(number) for number in data["temperatures"])


def test_the_slider_has_a_range_if_all_rows_are_equal(tmp_path: Path) -> None:
    store = SoftKVStore(WIDTH, 1, temperature=0.5)
    store.add(torch.ones(5, WIDTH), torch.ones(5, 1))
    write_page(tmp_path / "page.html", store, make_queries(2))
    data = embedded(tmp_path / "page.html")
    assert data["queries"][0]["gaps"] == [0] * 5
    assert data["temperatures"][0] > 0.5 > data["temperatures"][-2] > 0


def test_measurements_are_plotted_as_lines(tmp_path: Path) -> None:
    from plotly import graph_objects

    columns = measurements()
    write_page(tmp_path / "page.html", make_store(), make_queries(), columns=columns, metric="accuracy")
    figures = embedded(tmp_path / "page.html")["figures"]
    assert set(figures) == {"by-temperature", "by-k"}
    for figure in figures.values():
        graph_objects.Figure(figure)  # plotly checks every property
        assert {trace["line"]["dash"] for trace in figure["data"]} == {"solid", "longdash"}
    lines = {(trace["name"], trace["yaxis"]): trace for trace in figures["by-temperature"]["data"]}
    assert {name.split(",")[0] for name, _ in lines} == {"hard", "k = 4", "k = 16", "exact"}
    assert lines["k = 4, softmax", "y"]["x"] == [0.1, 1.0]
    assert lines["k = 4, softmax", "y"]["y"] == [0.025, 0.25]
    assert lines["k = 4, entmax15", "y2"]["y"] == [1 - 0.0125, 1 - 0.125]
    assert 0 < max(lines["exact, softmax", "y"]["y"]) < 0.1 / 16  # stands for 0 on the logarithmic axis
    along = {(trace["name"], trace["yaxis"]): trace for trace in figures["by-k"]["data"]}
    assert along["temperature 0.1, softmax", "y"]["x"] == [1, 4, 16, ROWS]
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.count("<td") == len(columns) * len(columns["mode"])


@pytest.mark.parametrize("targets", [None, torch.arange(3)])
def test_a_comparison_is_plotted_with_its_metric(tmp_path: Path, targets: torch.Tensor | None) -> None:
    store, queries = make_store(), make_queries()
    found = lab.compare(store, queries, ks=(4,), targets=targets)
    write_page(tmp_path / "page.html", store, queries, columns=found)
    metric = found.metric or "mass"
    write_page(tmp_path / "columns.html", store, queries, columns=found.to_dict(), metric=metric)
    assert (tmp_path / "page.html").read_text() == (tmp_path / "columns.html").read_text()
    write_page(tmp_path / "page.html", store, queries, columns=found, metric="agreement")
    figure = embedded(tmp_path / "page.html")["figures"]["by-k"]
    assert figure["layout"]["yaxis2"]["title"]["text"] == "agreement"


@pytest.mark.parametrize(("scale", "limits"), [(1.0, [0, 1]), (100.0, None)])
def test_the_axis_of_accuracy_ends_at_one(tmp_path: Path, scale: float, limits: list[int] | None) -> None:
    columns = measurements()
    columns["accuracy"] = [scale * accuracy for accuracy in columns["accuracy"]]
    write_page(tmp_path / "page.html", make_store(), make_queries(), columns=columns, metric="accuracy")
    for figure in embedded(tmp_path / "page.html")["figures"].values():
        assert figure["layout"]["yaxis2"].get("range") == limits


def test_missing_measurements_are_skipped(tmp_path: Path) -> None:
    columns = {
        "mode": ["hard", "topk", "exact"],
        "normalizer": ["softmax"] * 3,
        "temperature": [None, 0.5, 0.5],
        "k": [None, 1000, None],
        "distance": [0.5, float("nan"), 0.0],
        "mass": torch.tensor([1.0, 0.5, 1.0]),
        "note": ["<i>", "b", None],
    }
    write_page(tmp_path / "page.html", make_store(), make_queries(), columns=columns)
    figures = embedded(tmp_path / "page.html")["figures"]
    assert [trace["x"] for trace in figures["by-k"]["data"]] == [[1, ROWS, ROWS]] * 2
    assert "<i>" not in (tmp_path / "page.html").read_text(encoding="utf-8").split("<script", 1)[0]
    only_hard = {name: column[:1] for name, column in columns.items()}
    write_page(tmp_path / "page.html", make_store(), make_queries(), columns=only_hard)


def measurements_without(name: str) -> dict[str, list[Any]]:
    return {key: column for key, column in measurements().items() if key != name}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"queries": [1.0]}, DtypeError, "queries: expected a floating-point torch.Tensor"),
        ({"queries": torch.ones(2, 3)}, ShapeError, r"queries: expected shape \(any, 8\), got \(2, 3\)"),
        ({"queries": torch.ones(3)}, ShapeError, r"queries: expected shape \(8,\), got \(3,\)"),
        ({"queries": torch.ones(0, WIDTH)}, ShapeError, "queries: expected 1 to 1,000 queries, got 0"),
        ({"queries": torch.ones(1001, WIDTH)}, ShapeError, "queries: expected 1 to 1,000 queries, got 1,001"),
        ({"queries": torch.full((WIDTH,), math.nan)}, ArgumentError, "finite"),
        ({"labels": "abc"}, DtypeError, "labels: expected a list of strings, got str 'abc'"),
        ({"labels": ["a"]}, ArgumentError, "labels: expected 200 strings, one for each row, got 1"),
        ({"labels": [1] * ROWS}, DtypeError, "labels: expected strings, got int 1"),
        ({"labels": {1: 2}}, DtypeError, "labels: expected a string for each id, got int 2"),
        ({"query_labels": ["a"]}, ArgumentError, "query_labels: expected 3 strings, one for each query, got 1"),
        ({"value_labels": ["a"]}, ArgumentError, "value_labels: expected 3 strings, one for each value, got 1"),
        ({"title": 3}, DtypeError, "title: expected a string, got int 3"),
        ({"metric": "accuracy"}, ArgumentError, "metric: expected None without columns"),
        ({"columns": [1]}, DtypeError, "columns: expected a Comparison or a mapping"),
        (
            {"columns": measurements_without("distance")},
            ArgumentError,
            "columns: expected .* got none named 'distance'",
        ),
        ({"columns": measurements_without("mass")}, ArgumentError, "columns: expected .* got none named 'mass'"),
        ({"columns": measurements(), "metric": "loss"}, ArgumentError, "columns: expected .* got none named 'loss'"),
        ({"columns": {**measurements(), "k": [1]}}, ArgumentError, "columns: expected lists of one length"),
        ({"columns": {**measurements(), "k": 1}}, DtypeError, r"columns\['k'\]: expected a list, got int 1"),
        ({"columns": {**measurements(), "mode": ["soft"] * 16}}, ArgumentError, r"columns\['mode'\]: expected one of"),
        (
            {"columns": {**measurements(), "k": [None] * 16}},
            DtypeError,
            r"columns\['k'\]: expected an integer, got None",
        ),
        (
            {"columns": {**measurements(), "temperature": [0] * 16}},
            ArgumentError,
            "temperature.*expected numbers above 0",
        ),
        ({"columns": {**measurements(), "distance": [-1] * 16}}, ArgumentError, "distance.*at least 0, got -1"),
        (
            {"columns": {**measurements(), "mass": ["x"] * 16}},
            DtypeError,
            "mass.*expected a number, got str 'x'",
        ),
    ],
)
def test_bad_arguments_do_not_change_the_file(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    path = tmp_path / "page.html"
    path.write_text("before")
    with pytest.raises(error, match=message):
        write_page(path, make_store(), options.pop("queries", make_queries()), **options)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_bad_paths_and_an_empty_store_raise(tmp_path: Path) -> None:
    with pytest.raises(
        ArgumentError, match=r"path: expected a file in an existing directory, .*; create the directory first"
    ):
        write_page(tmp_path / "none" / "page.html", make_store(), make_queries())
    with pytest.raises(ArgumentError, match="path: expected the name of a file, got the directory"):
        write_page(tmp_path, make_store(), make_queries())
    with pytest.raises(DtypeError, match="path: expected the name of a file, got int 3"):
        write_page(3, make_store(), make_queries())  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="store: expected at least one row, got none"):
        write_page(tmp_path / "page.html", SoftKVStore(WIDTH, 1), make_queries())
    assert not list(tmp_path.iterdir())


def test_a_failed_write_removes_the_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(page.os, "replace", refuse)
    with pytest.raises(OSError, match="no space left"):
        write_page(tmp_path / "page.html", make_store(), make_queries())
    assert not list(tmp_path.iterdir())


def test_pages_without_plotly_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(MissingPackageError, match=re.escape("pip install 'softdb[page]'")):
        write_page(tmp_path / "page.html", make_store(), make_queries())
    assert not list(tmp_path.iterdir())


# -- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no Chromium with its chromedriver on PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.page_load_strategy = "normal"
    profile = tmp_path_factory.mktemp("browser")
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.add_argument(f"--user-data-dir={profile}")
    options.add_argument("--window-size=1200,900")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=Service(driver))
    try:
        opened.set_page_load_timeout(SECONDS)
        opened.set_script_timeout(SECONDS)
        yield opened
    finally:
        opened.quit()


def show(browser: webdriver.Chrome, path: Path) -> None:
    browser.get(path.as_uri())
    WebDriverWait(browser, SECONDS).until(
        lambda b: b.execute_script("return !!document.getElementById('weights').data")
    )


def bars(browser: webdriver.Chrome) -> dict[str, Any]:
    return browser.execute_script("return document.getElementById('weights').data[0]")  # type: ignore[no-any-return]


def press(browser: webdriver.Chrome, id: str, *keys: str) -> None:
    browser.find_element(By.ID, id).send_keys(*keys)


def chosen(browser: webdriver.Chrome, id: str) -> int:
    return int(browser.find_element(By.ID, id).get_property("value"))  # type: ignore[arg-type]


def console(browser: webdriver.Chrome) -> list[Any]:
    return [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def requested(browser: webdriver.Chrome) -> list[str]:
    """Return the URLs that pages from files requested.

    The start page of the browser requests some too.
    """
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
    return [parameters["request"]["url"] for parameters in sent if parameters["documentURL"].startswith("file:")]


@pytest.mark.slow
def test_the_sliders_change_the_bars(browser: webdriver.Chrome, tmp_path: Path) -> None:
    store, queries = make_store(), make_queries()
    path = tmp_path / "page.html"
    write_page(path, store, queries, columns=measurements(), metric="accuracy")
    data = embedded(path)
    show(browser, path)

    def agrees(query: int, temperature: float, k: int | None) -> list[float]:
        if k is None:
            read = store.read(queries[query], "exact", k=ROWS, temperature=temperature)
        else:
            read = store.read(queries[query], "topk", k=k, temperature=temperature)
        assert read.weights is not None
        weights = read.weights
        shown: list[float] = bars(browser)["x"]
        expected = torch.zeros(page_explorer.MAX_BARS + 1)
        expected[: min(page_explorer.MAX_BARS, len(weights))] = weights[: page_explorer.MAX_BARS]
        expected[-1] = weights[page_explorer.MAX_BARS :].sum()
        torch.testing.assert_close(torch.tensor(shown, dtype=torch.float32), expected, rtol=0, atol=1e-3)
        effective = float(torch.special.entr(weights).sum().exp())
        said = browser.find_element(By.ID, "effective").text.split(" of ")
        assert float(said[0].replace(",", "")) == pytest.approx(effective, rel=1e-2)
        assert said[1] == str(ROWS)
        answer = browser.execute_script("return document.getElementById('answer').data[1].y")
        torch.testing.assert_close(torch.tensor(answer, dtype=torch.float32), read.values, rtol=0, atol=2e-3)
        return shown

    at_first = agrees(0, 0.7, None)
    press(browser, "temperature", *[Keys.ARROW_LEFT] * 8)
    temperature = data["temperatures"][chosen(browser, "temperature")]
    assert temperature > 0.7
    softer = agrees(0, temperature, None)
    assert softer[0] < at_first[0]
    press(browser, "temperature", Keys.HOME)
    assert max(agrees(0, data["temperatures"][0], None)[:-1]) < 0.05
    press(browser, "temperature", Keys.END, *[Keys.ARROW_LEFT] * 12)
    harder = agrees(0, data["temperatures"][chosen(browser, "temperature")], None)
    assert harder[0] > at_first[0]

    press(browser, "temperature", Keys.HOME, *[Keys.ARROW_RIGHT] * 20)
    temperature = data["temperatures"][chosen(browser, "temperature")]
    for keys in ([Keys.HOME], [Keys.ARROW_RIGHT] * 4, [Keys.ARROW_RIGHT] * 14):
        press(browser, "k", *keys)
        k = data["ks"][chosen(browser, "k")]
        shown = agrees(0, temperature, k)
        assert [share > 0 for share in shown[:-1]] == [place < k for place in range(page_explorer.MAX_BARS)]
    assert k > page_explorer.MAX_BARS

    before = bars(browser)
    Select(browser.find_element(By.ID, "query")).select_by_index(2)
    assert agrees(2, temperature, k) != before["x"]
    assert bars(browser)["hovertext"] != before["hovertext"]

    press(browser, "temperature", Keys.END)
    assert bars(browser)["x"][0] > 0.99
    hard = store.read(queries[2], "hard")
    answers = browser.execute_script("return document.getElementById('answer').data.map((trace) => trace.y)")
    torch.testing.assert_close(
        torch.tensor(answers, dtype=torch.float32), torch.stack([hard.values] * 2), rtol=1e-4, atol=1e-4
    )

    assert browser.execute_script("return document.querySelectorAll('#by-k .scatter').length") == 8
    assert console(browser) == []
    urls = requested(browser)
    assert path.as_uri() in urls
    assert all(url == path.as_uri() or url.startswith("data:") for url in urls), urls


@pytest.mark.slow
def test_a_browser_shows_labels_as_text(browser: webdriver.Chrome, tmp_path: Path) -> None:
    store = make_store(4)
    options = {"labels": [NASTY] * 4, "query_labels": [NASTY], "value_labels": [NASTY, "b", "c"], "title": NASTY}
    write_page(tmp_path / "page.html", store, make_queries(1), **options)  # type: ignore[arg-type]
    show(browser, tmp_path / "page.html")
    assert browser.execute_script("return window.broken") is None
    assert browser.title == NASTY
    assert browser.find_element(By.TAG_NAME, "h1").text == NASTY
    assert browser.find_element(By.ID, "best").text == NASTY
    ticks = browser.find_elements(By.CSS_SELECTOR, "#weights .ytick text")
    assert len(ticks) == 4
    for tick in ticks:
        assert tick.text.startswith("</script><script>")
        assert tick.text.endswith("…")
    # The line of a bar shows the whole label on hover, also where the bar is short.
    press(browser, "k", Keys.HOME)
    ticks = browser.find_elements(By.CSS_SELECTOR, "#weights .ytick text")
    ActionChains(browser).move_to_element(ticks[2]).move_by_offset(400, 0).perform()
    waiting = WebDriverWait(browser, SECONDS)
    hover = waiting.until(lambda b: b.find_elements(By.CSS_SELECTOR, "#weights .hovertext text.nums"))[0]
    shown = str(hover.get_property("textContent"))
    assert NASTY.replace(" ", "") in shown.replace(" ", "")
    assert console(browser) == []


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 400])
def test_the_page_fits_the_window(browser: webdriver.Chrome, tmp_path: Path, width: int) -> None:
    path = tmp_path / "page.html"
    options: dict[str, Any] = {"labels": ["a label that is as long as labels are"] * ROWS}
    write_page(path, make_store(), make_queries(), columns=measurements(), **options)
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        show(browser, path)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        cut = """
            const frame = document.getElementById('weights').getBoundingClientRect();
            const texts = [...document.querySelectorAll('#weights text')].filter((text) => text.textContent);
            return texts.filter((text) => {
              const box = text.getBoundingClientRect();
              return box.left < frame.left - 1 || box.right > frame.right + 1;
            }).map((text) => text.textContent);
        """
        assert browser.execute_script(cut) == []
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
