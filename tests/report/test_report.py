"""The page: complete, alone (nothing is fetched), and what comes from files is text in it, never markup."""

from dataclasses import replace

import numpy as np
import pytest
from html_page import Page

from cpjax.crosscheck import judge
from cpjax.crosscheck.judging.problem import checked_problem
from cpjax.crosscheck.report.figures import figures
from cpjax.crosscheck.report.page import html, write_report
from cpjax.crosscheck.run.session import Judged, Shown
from cpjax.errors import InputError
from cpjax.trial.emulators import PROFILES, attend, chunk_results, cut, fold, visits
from cpjax.trial.problem import Problem

EVIL = "<script>alert(1)</script>"


def judged(*, wrong: bool, is_causal: bool = False) -> Judged:
    """A judged result at cp 2; wrong: chunk 2 of the keys was left out of chunk 1 of the queries."""
    rng = np.random.default_rng(0)
    shapes = (64, 2, 16), (64, 2, 16), (64, 2, 8)
    p = Problem(*(rng.normal(size=(1, *shape)) for shape in shapes), 0.25, is_causal=is_causal, cp=2).cast("float16")
    out, lse = attend(p, PROFILES["flash_fp16"], "ring")
    if wrong:
        blocks = chunk_results(p, PROFILES["flash_fp16"], cut(64, 4))
        order = np.array([c for c in visits(p, "ring")[16] if c != 2])  # a row of chunk 1
        without = fold(blocks, np.broadcast_to(order, (64, len(order))), PROFILES["flash_fp16"])
        out[:, 16:32], lse[:, 16:32] = without[0][:, 16:32], without[1][:, 16:32]
    options = {**p.judge_arguments(), "layout": "zigzag", "precision": "flash_fp16", "order": "ring"}
    verdict = judge(p.query, p.key, p.value, out, lse, **options)
    asked = checked_problem(p.query, p.key, p.value, **options)
    about = {"torch": "2.13.0", EVIL: EVIL}
    return Judged(
        EVIL, EVIL, "flash_fp16", "ring", None, verdict, remarks=(EVIL,), about=about, shown=Shown(asked, out, lse)
    )


@pytest.fixture(scope="module")
def wrong():
    return judged(wrong=True)


def test_the_page_is_whole_and_needs_no_network(wrong):
    text = html([wrong, judged(wrong=False)], "cpjax judge")
    page = Page(text)
    page.assert_alone()
    assert "href" in {name for name, _ in page.attributes}


def test_it_says_what_the_verdict_says(wrong):
    page = Page(html([wrong], "cpjax judge"))
    assert wrong.verdict is not None
    for number in (f"{wrong.verdict.z:.3f}", f"{wrong.verdict.max_error:.3g}", f"{wrong.verdict.hard_ratio:.3g}"):
        assert page.says(number)
    for sentence in (*wrong.verdict.reasons, *wrong.verdict.diagnosis, EVIL, "NOT PASSED", "2.13.0"):
        assert page.says(sentence)
    assert wrong.verdict.diagnosis


def test_a_right_result_has_no_diagnosis_and_passes():
    words = " ".join(Page(html([judged(wrong=False)], "cpjax judge")).words)
    assert "PASSED" in words
    assert "NOT PASSED" not in words
    assert "Diagnosis" not in words


def test_the_maps_point_at_the_fault(wrong):
    """Chunk 2 was left out of query chunk 1: there the errors point along it; rank 1 met it at step 0."""
    drawn = figures(wrong.shown.problem, wrong.shown.out)
    assert np.unravel_index(np.nanargmax(np.abs(drawn.pull)), drawn.pull.shape) == (1, 2)
    assert np.unravel_index(np.nanargmax(drawn.steps), drawn.steps.shape) == (1, 0)
    assert drawn.spread[1].min() > 3 > 1.3 > np.delete(drawn.spread, 1, axis=0).max()
    assert abs(drawn.histogram.sum() - 1) < 1e-9
    right = figures(*judged(wrong=False).shown[:2])
    assert right is not None
    assert np.nanmax(np.abs(right.pull)) < 6


def of_many_heads(heads=24, tokens=96):
    """One device; head 17 is wrong from query 60 on."""
    rng = np.random.default_rng(1)
    p = Problem(*(rng.normal(size=(1, tokens, n, 16)) for n in (heads, 4, 4)), 0.25, is_causal=True).cast("float16")
    out, lse = attend(p, PROFILES["flash_fp16"], "ring")
    out[:, 60:, 17] *= np.float16(1.25)
    options = {**p.judge_arguments(), "precision": "flash_fp16"}
    verdict = judge(p.query, p.key, p.value, out, lse, **options)
    asked = checked_problem(p.query, p.key, p.value, **options)
    return Judged("heads", "x", "flash_fp16", "ring", None, verdict, shown=Shown(asked, out, lse))


def test_the_map_of_query_and_head_shows_where():
    """With one chunk, too; each run of queries was looked at, and the page draws a cell for each."""
    one = of_many_heads()
    drawn = figures(one.shown.problem, one.shown.out)
    assert drawn.bands.shape == (32, 24)
    assert drawn.band_starts == tuple(range(0, 96, 3))
    assert np.isfinite(drawn.bands[1:]).all()  # the first rows see so few keys that some have no error at all
    wrong = np.nan_to_num(drawn.bands) > 3
    assert wrong[20:, 17].all()
    assert not wrong[:20].any()
    assert not np.delete(wrong, 17, axis=1).any()
    page = Page(html([one], "t"))
    assert page.says("first query of a run 93, head 17: ")


def test_what_nobody_sees_stays_empty():
    drawn = figures(*judged(wrong=False, is_causal=True).shown[:2])
    assert drawn is not None
    seen = np.tri(4, dtype=bool)
    assert np.isnan(drawn.pull[~seen]).all()
    assert np.isfinite(drawn.pull[np.tri(4, k=-1, dtype=bool)]).all()


def test_results_that_cannot_be_drawn_are_still_on_the_page(wrong):
    refused = Judged("a", "npu", error="no such file")
    words = " ".join(Page(html([refused, replace(wrong, shown=None)], "t")).words)
    assert "no such file" in words


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path, wrong, monkeypatch):
    page = write_report(tmp_path / "r", [wrong], "t")
    before = page.read_bytes()
    with pytest.raises(InputError, match="nothing is overwritten"):
        write_report(tmp_path / "r", [wrong], "t")
    assert page.read_bytes() == before
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(InputError, match="No space left"):
        write_report(tmp_path / "s", [wrong], "t")
    assert [path.name for path in tmp_path.iterdir()] == ["r"]
