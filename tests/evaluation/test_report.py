"""report.html: its content, that text stays text, that it needs nothing but itself; looked at in Chromium."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from egohod.evaluation import report as galleries
from egohod.evaluation.report import confusion_plot, most_confused, write_report
from egohod.evaluation.results import headlines
from tests.browser import browser, needs_chromium
from tests.support import Command

HOSTILE = (
    '</td><script>document.title = "owned"</script><img src="https://example.org/x.png" onerror="alert(1)"> $\\frac{'
)


@pytest.fixture
def copy(evaluated: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(evaluated, tmp_path / "results"))


@pytest.fixture
def hostile(copy: Path) -> Path:
    """The same with annotations by an enemy."""
    change(
        copy, "ek100_cls", lambda table: table["classes"].__setitem__(slice(None), [HOSTILE] * len(table["classes"]))
    )
    change(copy, "ek100_mir", lambda table: table["texts"].__setitem__(slice(None), [HOSTILE] * len(table["texts"])))
    results = json.loads((copy / "results.json").read_text())
    results["checkpoint"]["path"] = HOSTILE
    results["benchmarks"]["ek100_cls"]["notes"] = [HOSTILE, "half a character: \ud800"]
    (copy / "results.json").write_text(json.dumps(results))
    write_report(copy)
    return copy


def change(folder: Path, name: str, how: Any) -> None:
    path = folder / "details" / f"{name}.json"
    content = json.loads(path.read_text())
    how(content["tables"][0])
    path.write_text(json.dumps(content))


def html(folder: Path) -> str:
    return (folder / "report.html").read_text()


def test_every_number_stands_on_the_page(evaluated: Path) -> None:
    page, results = html(evaluated), json.loads((evaluated / "results.json").read_text())
    for name, each in results["benchmarks"].items():
        assert f">{name}</h2>" in page or f">{name} <" in page or f">{name}\n" in page, name
        for metric, number in each["metrics"].items():
            if number["value"] is None:
                continue
            row = re.search(rf"<tr><td>{metric}</td>.*?<b>{number['value'] + 0.0:.1f}.*?</tr>", page, re.DOTALL)
            assert row, metric
            low, high = number["interval"]
            assert low is None or f"{low:.1f} to {high:.1f}" in page
            for control in number["controls"].values():
                assert f"{control['value']:.1f}" in page
    overview = page[page.index("All benchmarks") : page.index("<h3>")]
    for number, (name, each) in enumerate(results["benchmarks"].items(), 1):
        assert f'<a href="#benchmark-{number}">{name}</a>' in overview
        for metric in headlines(each["metrics"]):
            assert f"{each['metrics'][metric]['value'] + 0.0:.1f} %" in overview
            assert all(
                f"{control['value'] + 0.0:.1f} %" in overview
                for control in each["metrics"][metric]["controls"].values()
            )
    assert "41.8 %" in page, "the published number"
    assert "0f" * 32 in page
    assert "a &lt;run&gt;" in page


def test_the_page_is_one_small_file_with_pictures(evaluated: Path) -> None:
    page = html(evaluated)
    assert page.count("data:image/jpeg;base64,") > 20
    assert page.count("data:image/png;base64,") == 2, "confusion of own and ek100_cls"
    assert "no picture" not in page
    assert len(page) < 3_000_000
    assert not re.search(r'(src|href)="(?!data:|#)', page)


def test_classes_stand_worst_first(evaluated: Path) -> None:
    tables = re.findall(r'<table id="classes-.*?</table>', html(evaluated), re.DOTALL)
    assert len(tables) == 3
    for table in tables:
        values = [float(value) for value in re.findall(r"<td>([\d.]+) %</td>", table)]
        assert values
        assert values == sorted(values)


def test_annotations_are_data(hostile: Path) -> None:
    page = html(hostile)
    assert page.count("<script") == 1
    assert "&lt;/td&gt;&lt;script&gt;" in page
    assert "https://example.org" not in re.sub(r"&lt;img src=&#34;https://example.org", "", page)


def test_videos_that_are_gone_cost_their_pictures_alone(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    for path in (copy / "details").glob("*.json"):
        content = json.loads(path.read_text())
        if path.stem == "egomcq":
            content["clips"]["root"] = "/nowhere"
        else:
            content["clips"]["video"] = ["gone"] * len(content["clips"]["video"])
        path.write_text(json.dumps(content))
    (copy / "details" / "ek100_cls.json").unlink()
    page = write_report(copy).read_text()
    assert "no picture: its video cannot be read" in page
    assert "data:image/jpeg" not in page
    assert "/nowhere: no such video folder" in caplog.text


def test_the_tool_makes_the_page_again(copy: Path, inside: Command) -> None:
    before = html(copy)
    (copy / "report.html").unlink()
    assert inside("report.py", copy).returncode == 0
    assert html(copy) == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("results.json", None, "No such file"),
        ("results.json", "{", "not readable as JSON"),
        ("results.json", '{"format": 99}', "not of format 1"),
        ("results.json", '{"format": 1}', "not what an evaluation writes"),
        ("results.json", '{"format": 1, "benchmarks": {}}', "not what an evaluation writes"),
        (
            "details/custom.json",
            '{"format": 1, "tables": [{"kind": "retrieval"}], "clips": {}}',
            "not what an evaluation",
        ),
    ],
)
def test_a_folder_without_results_is_an_error_of_one_line(
    copy: Path, inside: Command, name: str, content: str | None, message: str
) -> None:
    if content is None:
        (copy / name).unlink()
    else:
        (copy / name).write_text(content)
    done = inside("report.py", copy)
    assert done.returncode == 2
    assert message in done.stderr
    assert name.rpartition("/")[2] in done.stderr


def test_galleries_are_bounded_and_even() -> None:
    clips = {"id": [str(i) for i in range(100)], "start": [0.0] * 100, "end": [None] * 100}
    labels = [i % 2 for i in range(100)]
    table = {"kind": "classification", "classes": ["a", "b"], "labels": labels, "best_classes": [[0, 1]] * 100}
    shown = galleries.gallery(table, clips)
    assert (shown.right_of_all, shown.wrong_of_all) == (50, 50)
    assert [card.title for card in shown.right] == ["0", "20", "40", "58", "78", "98"]
    assert len(shown.wrong) == galleries.CARDS
    assert [answer.right for answer in shown.wrong[0].answers] == [False, True]


def test_a_question_that_asks_for_a_clip_shows_what_was_taken_and_what_was_right() -> None:
    clips = {"id": ["a", "b"], "start": [0.0, 1.0], "end": [1.0, 2.0]}
    question = {"kind": "inter", "query_is_clip": False, "query": 0, "choices": [1, 0], "answer": 1, "taken": 0}
    questions: list[dict[str, Any]] = [question | {"similarity": [0.5, 0.25]}]
    table = {"kind": "multiple_choice", "texts": ["opens"], "questions": questions}
    (card,) = galleries.gallery(table, clips).wrong
    assert card.pictures == [("chosen", 1), ("correct", 0)]
    assert card.truth == "opens"
    assert [(answer.text, answer.right) for answer in card.answers] == [
        ("b, 1.00–2.00 s", False),
        ("a, 0.00–1.00 s", True),
    ]
    # One of several correct choices is enough.
    questions[0]["also"] = [0]
    (card,) = galleries.gallery(table, clips).right
    assert card.pictures == [("chosen", 1)]
    assert [answer.right for answer in card.answers] == [True]


def test_the_most_confused_classes_are_plotted_whatever_they_are_called() -> None:
    confusion = [[0, 0, 9], [1, 2, 5], [2, 1, 4], [3, 0, 1]]
    assert most_confused(confusion, 2) == [1, 2]
    assert most_confused(confusion) == [0, 1, 2, 3]
    assert confusion_plot(confusion, ["$x", "a$\\frac{", "\n", "ü" * 100]).startswith(b"\x89PNG")


@pytest.mark.ci
@needs_chromium
@pytest.mark.parametrize("width", [1100, 360])
def test_the_page_in_a_browser(hostile: Path, tmp_path: Path, width: int) -> None:
    (hostile / "report.html").rename(tmp_path / "report.html")
    with browser(tmp_path / "profile") as page:
        page.size(width, 800, mobile=width < 500)
        page.open(tmp_path / "report.html")
        assert page.run("document.title") == "DEMO: evaluation"
        assert page.run("document.documentElement.scrollWidth") <= width, "no sideways scrolling"
        assert all(each > 50 for each in page.pictures())

        # Typed as a person would, into the classes of the demo world.
        rows = "[...document.querySelectorAll('#classes-1-1 tbody tr')].filter((row) => row.offsetHeight > 0)"
        names = page.run(f"{rows}.map((row) => row.cells[0].textContent)")
        word = names[0].split()[-1]
        page.run("document.querySelector('input[data-filters=classes-1-1]').focus()")
        page.send("Input.insertText", text=f"  {word.upper()} ")
        assert page.run(f"{rows}.map((row) => row.cells[0].textContent)") == [name for name in names if word in name]
        assert page.run("document.getElementById('classes-1-1-count').textContent").endswith(f"of {len(names)}")
        page.send("Input.insertText", text="no such class")
        assert page.run(f"{rows}.length") == 0

        assert page.complaints == []
        assert {each for each in page.requests if not each.startswith("data:")} == {
            (tmp_path / "report.html").resolve().as_uri()
        }


@pytest.mark.ci
@needs_chromium
def test_the_pages_policy_stops_what_would_slip_through(evaluated: Path, tmp_path: Path) -> None:
    slipped = html(evaluated).replace("</main>", HOSTILE + "</main>")
    (tmp_path / "report.html").write_text(slipped)
    with browser(tmp_path / "profile") as page:
        page.open(tmp_path / "report.html")
        assert page.run("document.title") == "DEMO: evaluation"
        assert any("Content Security Policy" in each for each in page.complaints)


def test_a_strip_is_small() -> None:
    from egohod.evaluation.page import jpeg
    from egohod.evaluation.report import HEIGHT, strip

    frames = np.random.default_rng(0).integers(0, 255, (3, 270, 480, 3), dtype=np.uint8)
    picture = strip(frames)
    assert picture.height == HEIGHT
    assert picture.width == 3 * 128 + 4
    assert len(jpeg(picture)) < 40_000
