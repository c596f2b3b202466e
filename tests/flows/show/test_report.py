"""The report: one pure page of what the store knows, without scripts or requests, whatever stands in the facts."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from checkpoint.log import RunLog
from checkpoint.store import open_store
from flows.drive.run import load_run
from flows.show import foretell
from flows.show.facts import report_facts
from flows.show.loss_chart import LETTER, AttemptFact, loss_chart
from flows.show.report import ReportFacts, render
from tests.flows.conftest import Trained
from tests.support.place import STEPS

FACTS = ReportFacts(
    run="demo-0a1b2c",
    outcome="succeeded",
    steps=60,
    curve={step: 7.0 / step for step in range(1, 61)},
    attempts=[
        AttemptFact(1, 1, 0.0, -1, "", 1, 33),
        AttemptFact(2, 5, 12.0, 30, "rank 1 was killed (signal 9)", 31, 60, 3, 0.62),
    ],
    checkpoints=[{"step": 30, "attempt": 1, "bytes": 1234567, "state_digest": "ab" * 32}],
    digest="cd" * 32,
    digest_one_stage="cd" * 32,
    sample="def f(x):\n    return x",
)
EVIL = "<script>alert(1)</script>\"'&"


class Page(HTMLParser):
    """Tags that stand open, and what a page would fetch or run."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input", "line", "path", "polyline", "rect"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.bad: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "img", "iframe", "object", "embed", "form"):
            self.bad.append(tag)
        self.bad += [
            f"{tag} {name}={value}" for name, value in attrs if name.startswith("on") or name in ("src", "href")
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.bad += [f"{tag} {name}" for name, _ in attrs if name.startswith("on") or name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        if tag in self.VOID:
            return
        assert self.open, f"</{tag}> without its start"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(page: str) -> Page:
    parsed = Page()
    parsed.feed(page)
    parsed.close()
    assert parsed.open == []
    return parsed


def test_it_is_pure_and_self_contained() -> None:
    page = render(FACTS)
    assert page == render(FACTS)
    assert read(page).bad == []
    assert not re.search(r"https?:|//[a-z]|@import|url\(", page.replace("http://www.w3.org/2000/svg", ""))


def test_it_escapes() -> None:
    evil = replace(
        FACTS,
        run=EVIL,
        outcome=EVIL,
        data_note=EVIL,
        sample=EVIL,
        memory_text=EVIL,
        reason=EVIL,
        notes=[EVIL],
        attempts=[replace(a, cause=EVIL) for a in FACTS.attempts],
        checkpoints=[{**FACTS.checkpoints[0], "state_digest": EVIL}],
        digest=EVIL,
        digest_one_stage=EVIL,
    )
    page = render(evil)
    assert "<script" not in page
    assert read(page).bad == []
    assert "".join(read(page).text).count("<script>alert(1)</script>") >= 10


def test_an_attempt_by_order_is_no_failure() -> None:
    by = {"reason": "ordered by ann (runs resume)", "layout": "4 stages x 1 replica"}
    ordered = replace(FACTS.attempts[1], cause="", recovery_s=None, **by)
    text = "".join(read(render(replace(FACTS, attempts=[FACTS.attempts[0], ordered]))).text)
    assert "4 stages x 1 replica" in text
    assert "ordered by ann (runs resume)" in text
    assert "0 stime lost to failures" in text
    assert "0.62 stime lost to failures" in "".join(read(render(FACTS)).text)


def test_attempts_are_marked_in_the_curve() -> None:
    svg = loss_chart(FACTS.curve, FACTS.attempts, [30], {})
    assert svg.count("stroke-dasharray") == 1
    assert "attempt 2" in svg
    assert "checkpoint at step 30" in svg
    assert "dasharray" not in loss_chart(FACTS.curve, FACTS.attempts[:1], [30], {})
    early, late = (dict.fromkeys(range(1, end), 5.0) for end in (1000, 32))
    for curve, ends in (early, False), (late, True):  # its words go to the side that has room for them
        assert ('text-anchor="end" y="28">attempt 2' in loss_chart(curve, FACTS.attempts, [], {})) == ends


def test_an_attempt_from_the_start_is_marked_where_the_one_before_had_come_to() -> None:
    attempts = [AttemptFact(1, 1, 0.0, -1, "", 1, 6), AttemptFact(2, 5, 1.0, -1, "why it died, " * 9, 1, 6, 6, 0.6)]
    svg = loss_chart({step: 9.0**step for step in range(1, 7)}, attempts, [], {})
    assert '<line x1="976.0" x2="976.0"' in svg  # step 6, at the right edge
    assert "why it …</text>" in svg  # what is cut says so
    assert re.findall(r'text-anchor="middle">([0-9.]+)<', svg) == ["1", "2", "3", "4", "5", "6"]  # steps are whole
    assert "9.00 → 5.31e+05" in render(replace(FACTS, curve={1: 9.0, 6: 9.0**6}))


def test_what_evaluations_gave_is_drawn_and_listed() -> None:
    rows = [{"step": "30", "validation/loss": "4.5", "failed": "bench: <b>it</b> exited with 1"}]
    facts = replace(FACTS, evaluations=rows, validation={30: 4.5, 40: float("inf")})
    page = render(facts)
    text = "".join(read(page).text)
    assert "Evaluations" in text
    assert "bench: <b>it</b> exited with 1" in text
    assert page.count("<circle") == 1
    assert "validation loss 4.5000 at step 30" in page
    assert "on validation data" not in render(FACTS)


@pytest.mark.parametrize("curve", [{}, {1: 3.0}, {1: 3.0, 2: 3.0}, {s: 1e-9 * s for s in range(1, 4)}])
def test_odd_curves(curve: dict[int, float]) -> None:
    read(render(replace(FACTS, curve=curve, steps=max(curve, default=0))))


def test_a_run_that_has_done_nothing_or_a_step() -> None:
    text = "".join(read(render(ReportFacts("r", "planned", 0, {}, [], []))).text)
    assert "No steps were recorded" in text
    assert "One step: loss 5.7329 at step 1." in render(replace(FACTS, curve={1: 5.73289}))


def test_a_loss_that_is_not_finite_leaves_the_others_drawn() -> None:
    page = render(replace(FACTS, curve={1: 5.0, 2: 4.0, 3: float("nan"), 4: float("inf")}))
    assert "nan" not in re.search("<polyline[^>]*>", page).group(0)  # type: ignore[union-attr]
    assert "5.00 → not finite" in page
    assert "Not finite, and not drawn: 2 of 4 losses." in page


def test_fifty_attempts_and_a_thousand_checkpoints_can_be_told_apart() -> None:
    attempts = [AttemptFact(n, n, 7200.0 * n, 200 * n - 200, "rank 1 was killed", lost_steps=10) for n in range(1, 51)]
    checkpoints = [{"step": step, "state_digest": "ab"} for step in range(10, 10_001, 10)]
    many = replace(FACTS, curve=dict.fromkeys(range(1, 10_001), 2.0), attempts=attempts, checkpoints=checkpoints)
    page = render(replace(many, store="file:///my runs"))
    assert page.count("stroke-dasharray") == 49
    assert page.count("><title>attempt ") == 49  # where there is no room for words a pointer finds them
    ends = []
    for x, side, words in re.findall(r'<text x="([0-9.]+)"( text-anchor="end")? y="28">([^<]*)<', page):
        begins = float(x) - (LETTER * len(words) if side else 0)
        ends.append((begins, begins + LETTER * len(words)))
    assert len(ends) >= 45  # most have their number at least
    assert all(one[1] <= other[0] for one, other in pairwise(ends))
    assert page.count("<path") < 150
    assert "950 older ones: <code>hotstage ckpt ls demo-0a1b2c --store 'file:///my runs'</code>" in page
    assert ">10,000</text>" in page
    assert "4 d 4 h" in page


def test_different_digests_are_shouted() -> None:
    assert "DIFFERENT" in render(replace(FACTS, digest_one_stage="ef" * 32))
    assert "DIFFERENT" not in render(FACTS)


def test_the_page_of_a_real_run_says_what_the_log_says(trained: Trained, tmp_path: Path) -> None:
    path = tmp_path / "below" / "report.html"
    trained.place.said("report", trained.run, "-o", str(path))
    page = path.read_text()
    text = "".join(read(page).text)
    store = open_store(f"file://{trained.place.folder / 'store'}")
    state = RunLog(store, trained.run).fold()
    assert trained.run in text
    assert trained.digest in text
    for checkpoint in state.restore_candidates():
        assert checkpoint.state_digest in text
    facts = report_facts(store, trained.run)
    assert list(facts.curve) == list(range(1, STEPS + 1))
    told = json.loads(trained.place.said("report", trained.run, "-o", str(path), "--json"))
    assert (told["run"], told["outcome"], told["digest"]) == (trained.run, "succeeded", trained.digest)
    assert len(told["attempts"]) == len(state.attempts) == 1
    prepared = load_run(store, trained.run)
    planned = foretell.facts(prepared.plan, prepared.spec, foretell.simulate(prepared.plan))["memory_text"]
    assert facts.memory_text == planned, "the table that hotstage plan shows"
