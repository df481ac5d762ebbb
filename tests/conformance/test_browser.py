"""The HTML report in a real browser: it opens from a file, filters, copies, and can be read."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conformance.clauses import clauses
from conformance.page import as_html
from tests.conformance import browser
from tests.conformance.conftest import ASKED
from tests.conformance.outcomes import SUITE, all_failing, failing, outcome, port
from tests.conformance.test_page import FIVE, HOSTILE

PORTS = ("honest_port", "wrong_scale", "only_4bit", "accepts_any_rank")


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with browser.chromium(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture
def opened(driver: Any, reported: Path) -> Any:
    """The report of the real run, freshly opened from its file."""
    return open_page(driver, reported / "verdict.html")


@pytest.fixture
def shown(driver: Any, tmp_path: Path) -> Callable[..., Any]:
    """Opens a report of made-up outcomes."""

    def show(*ports: Any) -> Any:
        path = tmp_path / "made up.html"
        path.write_text(as_html(ports, SUITE), encoding="utf-8")
        return open_page(driver, path)

    return show


def open_page(driver: Any, path: Path) -> Any:
    browser.resize(driver, 1280)
    browser.prefer(driver, "light")
    driver.get("about:blank")
    driver.get_log("browser")
    browser.requests(driver)
    driver.get(path.as_uri())
    return driver


def all_of(driver: Any, selector: str) -> list[Any]:
    found: list[Any] = driver.find_elements("css selector", selector)
    return found


def one(driver: Any, selector: str) -> Any:
    return driver.find_element("css selector", selector)


def visible_rows(driver: Any) -> list[str]:
    rows = all_of(driver, "tr[data-clause]")
    return [row.get_attribute("data-clause") for row in rows if row.is_displayed()]


def count_shown(driver: Any) -> str:
    text: str = one(driver, "#shown").text
    return text


def test_a_machine_without_a_browser_is_told_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In CI a page that nobody opened is a failure, elsewhere a skipped test."""
    monkeypatch.setattr("shutil.which", lambda name: None)
    for ci, expected in (("1", pytest.fail.Exception), ("", pytest.skip.Exception)):
        monkeypatch.setenv("CI", ci)
        with pytest.raises(expected, match="apt-get install -y chromium chromium-driver"):
            browser.chromium(tmp_path).__enter__()


def test_it_opens_without_an_error_and_without_the_network(opened: Any, reported: Path) -> None:
    assert opened.title == f"Conformance: {', '.join(PORTS)}"
    assert opened.get_log("browser") == []
    asked = [url for url in browser.requests(opened) if not url.startswith("data:")]
    assert asked == [(reported / "verdict.html").as_uri()]


def test_the_policy_lets_nothing_out(opened: Any) -> None:
    outcome = opened.execute_async_script(
        "const done = arguments[0];"
        "fetch('https://example.invalid/').then(() => done('sent'), () => done('refused'));"
    )
    assert outcome == "refused"
    assert "Content Security Policy" in opened.get_log("browser")[0]["message"]


def test_the_matrix_has_a_row_per_clause_and_a_cell_per_port(opened: Any) -> None:
    assert sorted(visible_rows(opened)) == sorted(ASKED)
    heads = [h.text.split("\n")[0] for h in all_of(opened, "thead th[data-port]")]
    assert heads == list(PORTS)
    words = [c.text for c in all_of(opened, "tr[data-clause='SCALE-2'] td")]
    assert [w.split()[1] for w in words] == ["pass", "fail", "pass", "pass"]
    missing = one(opened, "tr[data-clause='FWD-21'] td[data-port='2']").text
    assert "not provided" in missing


def test_verdicts_stand_at_the_top(opened: Any) -> None:
    said = [v.text for v in all_of(opened, ".verdict .word")]
    assert [s[2:] for s in said] == ["conforms", "does not conform", "conforms", "conforms"]


def test_a_status_filter_hides_and_counts(opened: Any) -> None:
    failing = int(one(opened, "[data-count='fail']").text)
    one(opened, "input[value='fail']").click()
    rows = visible_rows(opened)
    assert len(rows) == failing < len(ASKED)
    assert {"FWD-1", "SCALE-2", "INIT-7"} <= set(rows)
    assert count_shown(opened) == f"{failing} of {len(ASKED)} clauses"
    details = {d.get_attribute("id") for d in all_of(opened, "details.clause") if d.is_displayed()}
    assert details == set(rows)
    one(opened, "#filters button[type='reset']").click()
    assert count_shown(opened) == f"{len(ASKED)} of {len(ASKED)} clauses"


def test_a_port_filter_shows_one_column_and_counts_it(opened: Any) -> None:
    one(opened, "select[name='port'] option[value='3']").click()
    heads = [h.text.split("\n")[0] for h in all_of(opened, "thead th") if h.is_displayed()]
    assert heads == ["clause", "accepts_any_rank"]
    assert one(opened, "[data-count='fail']").text == "1"
    one(opened, "input[value='fail']").click()
    assert visible_rows(opened) == ["INIT-7"]
    articles = [a.get_attribute("id") for a in all_of(opened, "article") if a.is_displayed()]
    assert articles == ["INIT-7-p3"]


def test_a_text_filter_finds_ids_sentences_and_messages(opened: Any) -> None:
    field = one(opened, "input[name='text']")
    for text, rows in {"scale-2": ["SCALE-2"], "Dyadic  DATA": ["FWD-2"]}.items():
        field.clear()
        field.send_keys(text)
        assert visible_rows(opened) == rows
    field.clear()
    field.send_keys("is off by")
    assert "FWD-1" in visible_rows(opened)
    field.clear()
    field.send_keys("no clause says this")
    assert visible_rows(opened) == []
    assert count_shown(opened) == f"0 of {len(ASKED)} clauses"
    assert one(opened, "#none").is_displayed()
    assert not any(chapter.is_displayed() for chapter in all_of(opened, "tr.chapter"))


def test_a_failure_shows_its_message_case_and_command(opened: Any) -> None:
    article = one(opened, "[id='FWD-1-p1']")
    assert article.is_displayed()
    assert "is off by" in one(article, ".message").text
    assert "4bit nf4 " in one(article, ".case").text
    command = one(article, ".again code").text
    assert command.startswith("pytest ")
    assert "--clause=FWD-1" in command
    assert "--case=" in command


@pytest.mark.parametrize("clipboard", ["as it is", "refused", "absent"])
def test_the_button_copies_the_command(opened: Any, clipboard: str) -> None:
    from selenium.webdriver.common.keys import Keys

    spoiled = {
        "as it is": "",
        "refused": "navigator.clipboard.writeText = () => Promise.reject(new Error('no'));",
        "absent": "Object.defineProperty(navigator, 'clipboard', {value: undefined});",
    }
    opened.execute_script(spoiled[clipboard])
    again = one(opened, "[id='SCALE-2-p1'] .again")
    button = one(again, "button.copy")
    button.click()
    wait_for(lambda: button.text == "Copied")
    assert one(opened, "#announce").get_attribute("textContent") == "Copied"
    field = one(opened, "input[name='text']")
    field.send_keys(Keys.CONTROL, "v")
    assert field.get_attribute("value") == one(again, "code").text


def test_a_cell_leads_to_its_finding(opened: Any) -> None:
    closed = one(opened, "details[id='MERGE-6']")
    assert closed.get_attribute("open") is None
    one(opened, "tr[data-clause='MERGE-6'] td[data-port='1'] a").click()
    assert opened.current_url.endswith("#MERGE-6-p1")
    wait_for(lambda: closed.get_attribute("open") is not None)
    top = opened.execute_script(
        "return document.getElementById('MERGE-6-p1').getBoundingClientRect().top"
    )
    assert 0 <= top < 900


def test_keys_alone_reach_the_matrix_and_the_filters(opened: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    body = one(opened, "body")
    body.send_keys(Keys.TAB)
    assert opened.switch_to.active_element.text == "Skip to the matrix"
    opened.switch_to.active_element.send_keys(Keys.ENTER)
    assert opened.switch_to.active_element.get_attribute("id") == "matrix"
    opened.switch_to.active_element.send_keys(Keys.TAB)
    assert opened.switch_to.active_element.get_attribute("name") == "text"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_their_ground(shown: Any, scheme: str) -> None:
    """WCAG 2.2 AA asks for a contrast of 4.5."""
    every = ("pass", "fail", "xfail", "xpass", "skip", "not-provided")
    page = shown(*(port(outcome("FWD-1", status, message="said"), name=status) for status in every))
    browser.prefer(page, scheme)
    contrasts = page.execute_script(CONTRASTS)
    assert len(contrasts) > 40
    assert {name: c for name, c in contrasts.items() if c < 4.5} == {}


def test_dark_is_dark(opened: Any) -> None:
    ground = "return getComputedStyle(document.body).backgroundColor"
    assert opened.execute_script(ground) == "rgb(255, 255, 255)"
    browser.prefer(opened, "dark")
    assert max(map(int, opened.execute_script(ground)[4:-1].split(","))) < 40


def test_it_is_whole_without_a_script(driver: Any, reported: Path) -> None:
    driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        page = open_page(driver, reported / "verdict.html")
        assert sorted(visible_rows(page)) == sorted(ASKED)
        assert not one(page, "#filters").is_displayed()
        assert not any(button.is_displayed() for button in all_of(page, "button"))
        assert one(page, "[id='SCALE-2-p1'] .again code").is_displayed()
    finally:
        driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_what_a_port_says_does_not_run(shown: Any) -> None:
    page = shown(port(failing("FWD-1", "4bit", HOSTILE, port=HOSTILE), name=HOSTILE))
    assert HOSTILE in one(page, ".message").text
    assert all_of(page, "img") == []
    assert page.get_log("browser") == []


@pytest.mark.parametrize("width", [360, 768, 1280, 1920])
def test_five_ports_that_fail_everything_fit_the_window(shown: Any, width: int) -> None:
    page = shown(*(all_failing(name) for name in FIVE))
    browser.resize(page, width)
    assert len(all_of(page, "tr[data-clause]")) == len(clauses())
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    cells = page.execute_script(OVERFLOWING)
    assert cells == []


def test_a_run_of_nothing_is_a_page(shown: Any) -> None:
    page = shown(port())
    assert "No clause was asked." in one(page, "main").text
    assert not one(page, "#filters").is_displayed()
    assert page.get_log("browser") == []


def test_paper_shows_every_clause(opened: Any) -> None:
    printed = opened.execute_cdp_cmd("Page.printToPDF", {"printBackground": False})
    assert len(printed["data"]) > 10_000
    assert all(d.get_attribute("open") is not None for d in all_of(opened, "details.clause"))


def wait_for(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


# Every element with text of its own: its colour against the first ground below it, as WCAG reckons.
CONTRASTS = """
const channel = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
const found = {};
for (const element of document.querySelectorAll("body *:not(script):not(option)")) {
  if (element.closest(".visually-hidden, [hidden], svg")) continue;
  if (![...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) continue;
  let ground = element;
  while (ground !== document.body && (numbers(getComputedStyle(ground).backgroundColor)[3] ?? 1) === 0) {
    ground = ground.parentElement;
  }
  const a = luminance(numbers(getComputedStyle(element).color));
  const b = luminance(numbers(getComputedStyle(ground).backgroundColor));
  const text = element.textContent.trim().slice(0, 30);
  const name = `${element.tagName}.${element.className} ${text} on ${ground.className}`;
  found[name] = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}
return found;
"""
# Elements whose text runs out of their cell.
OVERFLOWING = """
return [...document.querySelectorAll("thead th, td, .verdict")]
  .filter((e) => e.scrollWidth > e.clientWidth + 1)
  .map((e) => e.textContent.trim().slice(0, 60));
"""
