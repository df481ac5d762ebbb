"""The HTML report as text: whole, alone, escaped, and readable without a script."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from conformance.clauses import clauses
from conformance.margin import Margin
from conformance.page import as_html
from conformance.plot import plot
from conformance.verdict import PortVerdict
from tests.conformance.outcomes import SUITE, all_failing, failing, outcome, port

VOID = {"meta", "link", "input", "br", "wbr", "rect", "path"}


class Page(HTMLParser):
    """Tags and attributes of a page, its ids and links, with every element closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(attrs) == len(dict(attrs)), f"{tag} has an attribute twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, attribute: str) -> list[str]:
        return [value for _, attrs in self.tags if (value := attrs.get(attribute)) is not None]

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def page(*ports: PortVerdict, **suite: object) -> Page:
    return Page(as_html(ports, {**SUITE, **suite}))


FIVE = tuple(f"{'a_port_with_a_long_name.' * 3}"[:58] + f"_{i}" for i in range(5))


@pytest.mark.parametrize(
    "ports",
    [
        [port()],
        [port(outcome("FWD-1", "skip", message="no GPU"))],
        [port(failing("FWD-1", "4bit")), port(outcome("FWD-2", "pass"), name="other")],
        [all_failing(name) for name in FIVE],
    ],
    ids=["nothing", "not asked", "different clauses", "everything fails"],
)
def test_ids_are_unique_and_links_lead_somewhere(ports: list[PortVerdict]) -> None:
    found = page(*ports)
    ids = found.all("id")
    assert len(ids) == len(set(ids))
    inside = {link[1:] for link in found.all("href") if link.startswith("#")}
    assert inside <= set(ids)


def test_nothing_is_fetched() -> None:
    text = as_html([all_failing("mine")], SUITE)
    found = Page(text)
    assert found.all("src") == []
    assert all(link.startswith("#") or link == "data:," for link in found.all("href"))
    assert not re.search(r"url\(|@import|https?://", text)
    (policy,) = (value for value in found.all("content") if "default-src" in value)
    assert "default-src 'none'" in policy


def test_every_clause_and_port_is_there() -> None:
    found = page(*(all_failing(name) for name in FIVE))
    rows = [
        attrs["data-clause"] for tag, attrs in found.tags if tag == "tr" and "data-clause" in attrs
    ]
    assert rows == list(clauses())
    assert found.count("td") == 5 * len(clauses())
    assert found.count("article") == 5 * len(clauses())
    assert all(name in found.text.replace(" ", "") for name in FIVE)


def test_the_head_says_what_was_run() -> None:
    found = page(port(outcome("FWD-1", "pass")), narrowed_by=["--layer=4bit"]).text
    for said in ("Specification 1.0", f"1 of {len(clauses())} clauses asked", "seed 3", "on cpu"):
        assert said in found
    for said in ("2.13.0", "bitsandbytes 0.50", "2026-01-02 03:04:05 UTC", "62 s", "narrowed by"):
        assert said in found


def test_each_port_has_its_verdict() -> None:
    found = page(
        port(outcome("FWD-1", "pass"), name="good"),
        port(failing("FWD-1", "4bit"), name="bad"),
        port(outcome("FWD-1", "skip"), name="idle"),
    ).text
    assert "good 1.0 ✓ conforms" in found
    assert "bad 1.0 ✗ does not conform" in found
    assert "idle 1.0 ✗ nothing was decided" in found


def test_a_run_of_nothing_says_so() -> None:
    assert "No clause was asked." in page(port()).text


def test_a_stale_known_failure_is_told() -> None:
    assert "x.toml: entry 3" in page(port(), stale_xfails=["x.toml: entry 3: no such layer"]).text


HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>'\"&amp;{{ 7 * 7 }}"


def test_what_a_port_says_is_text() -> None:
    bad = port(failing("FWD-1", "4bit", HOSTILE, port=HOSTILE), name=HOSTILE)
    bad.version = HOSTILE
    found = page(
        bad, port(name="other"), device=HOSTILE, versions={HOSTILE: HOSTILE}, stale_xfails=[HOSTILE]
    )
    assert found.count("script") == 1
    assert found.count("img") == 0
    assert not any(name.startswith("on") for _, attrs in found.tags for name in attrs)
    # In the title, a heading of each place, the message and the command: whole, and as text.
    assert found.text.count("<script>alert(1)</script>") >= 6
    assert "{{ 7 * 7 }}" in found.text


def test_a_status_is_told_by_a_word() -> None:
    every = ("pass", "fail", "xfail", "xpass", "skip", "not-provided")
    found = page(*(port(outcome("FWD-1", status), name=status) for status in every)).text
    for word in ("pass", "fail", "known failure", "unexpected pass", "not asked", "not provided"):
        assert found.count(word) >= 3, word


def test_layers_that_differ_are_told_apart() -> None:
    found = page(port(outcome("FWD-1", "pass"), failing("FWD-1", "8bit")))
    assert "fail 8bit" in found.text


def test_a_failure_is_open_and_a_pass_is_closed() -> None:
    found = page(port(failing("FWD-1", "4bit"), outcome("FWD-2", "pass")))
    opened = {
        attrs["id"]: "open" in attrs
        for tag, attrs in found.tags
        if tag == "details" and "id" in attrs
    }
    assert opened == {"FWD-1": True, "FWD-2": False}


def test_headings_leave_out_no_level() -> None:
    levels = [
        int(tag[1])
        for tag, _ in page(port(failing("FWD-1", "4bit"))).tags
        if re.fullmatch("h[1-6]", tag)
    ]
    assert levels[0] == 1
    assert all(below - above <= 1 for above, below in pairwise(levels))


def test_a_plot_is_told_in_words_and_marks_the_bound() -> None:
    found = page(port(failing("FWD-1", "4bit")))
    (label,) = (attrs["aria-label"] for tag, attrs in found.tags if attrs.get("role") == "img")
    assert label == (
        "Error / bound. bfloat16: 4 tensors, median 0.32, worst 0.90; "
        "float32: 3 tensors, median 0.03, worst 3e+05."
    )
    assert "error / bound (the bound is at 1)" in found.text


def test_bars_stand_where_their_ratios_are() -> None:
    (strip,) = plot([Margin.of("float32", [0.0, 0.0, 0.5])]).strips
    left, right = re.findall(r"M([\d.]+) \d+v-([\d.]+)", strip.inside)
    assert (float(left[0]), float(right[0])) == (4.5, 154.5), "the first bar, and the eleventh"
    assert float(left[1]) == 2 * float(right[1])
    assert strip.beyond == ""


def test_a_small_ratio_is_not_called_none() -> None:
    (strip,) = plot([Margin.of("float32", [0.0, 0.0, 1e-5])]).strips
    assert strip.label == "float32: 3 tensors, median 0, worst below 0.01"


def test_a_single_tensor_among_many_shows() -> None:
    (strip,) = plot([Margin.of("float32", [0.1] * 10_000 + [7.0])]).strips
    assert re.search(r"v-2h", strip.beyond)


def test_the_file_is_of_a_bearable_size(reported: Path) -> None:
    assert (reported / "verdict.html").stat().st_size < 200_000
    assert len(as_html([all_failing(name) for name in FIVE], SUITE)) < 5_000_000
