"""The page of ``egohod serve`` in Chromium: a real server, model and videos; the keyboard alone, a phone, many tabs."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the extra [serve]: pip install fastapi uvicorn")

from tests.browser import Page, browser, needs_chromium
from tests.serve.conftest import HOSTILE
from tests.support import ROOT, Command, ShortRun, environment, losses

pytestmark = [pytest.mark.ci, needs_chromium]


@contextlib.contextmanager
def server(*arguments: object) -> Iterator[str]:
    """A server on a free port, and its address; it ends by itself if the test does not end it."""
    command = [sys.executable, "tools/serve.py", *map(str, arguments), "--port", "0", "--idle", "300"]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            opened = re.match(r"open (http://\S+)", process.stdout.readline())
            assert opened, process.stderr and process.stderr.read()
            yield opened[1]
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def searchable(
    new_index: Callable[..., Path], videos: Path, short_run: ShortRun, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Features of real windows by a real model, of all videos but one whose file is gone since."""
    folder = tmp_path_factory.mktemp("searchable") / "features"
    (videos / "gone.mp4").write_bytes((videos / "hevc.mp4").read_bytes())
    command = [sys.executable, "tools/extract_features.py", *short_run.command, "--checkpoint", str(short_run.folder)]
    command += ["--videos", str(videos), "--window", "2", "--stride", "1", "--output", str(folder), "data.workers=0"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (videos / "gone.mp4").unlink()
    return folder


ANSWERED = "document.activeElement.matches('.card') && performance.getEntriesByName('first result').length"
PLAYS = "state.playing && !player.paused && player.currentTime > 0 && player.videoWidth"


def search(page: Page, text: str) -> None:
    page.run("performance.clearMeasures()")
    page.press("/", *text, "Enter")
    page.until(ANSWERED)


def test_search_play_and_mark_by_the_keyboard_alone(
    searchable: Path, tmp_path: Path, program: Command, short_run: ShortRun, videos: Path
) -> None:
    (searchable / "marks.json").unlink(missing_ok=True)
    with server(searchable) as address, browser(tmp_path / "chromium") as page:
        page.size(1280, 800)
        page.open(address)
        page.until("document.querySelector('.card')")
        page.press("Tab")
        assert page.run("document.activeElement.textContent") == "Skip to the results"
        page.press("Enter")
        page.until("document.activeElement.matches('.card')")
        assert "1 of the videos is gone" in page.run("document.querySelector('#notice').textContent")
        search(page, "#C C opens the jar")
        shown = page.run("performance.getEntriesByName('first result')[0].duration")
        print(f"first result {shown:.0f} ms after the answer")
        names = page.run("[...document.querySelectorAll('.card .name')].map((each) => each.textContent)")
        assert HOSTILE in names
        assert page.run("document.querySelectorAll('.card img').length === document.images.length - 2"), "no markup"

        # Only a file that browsers play as it is, at the right second.
        page.run("document.querySelector('#video').value = 'kitchen'; undefined")
        search(page, "#C C opens the jar")
        page.press("j", "k", "Enter")
        page.until(PLAYS)
        start, end = page.run("[state.playing.start, state.playing.end]")
        assert page.run("player.src").endswith(f"/video/0/{page.run('state.playing.row')}")
        page.until(f"player.currentTime >= {start} && player.currentTime <= {end} + 0.3")
        label = page.run("document.querySelector('#label').value")
        assert label == "#C C opens the jar"
        page.press("r")
        page.until("document.querySelector('.card.right[aria-selected=true]')")
        # A key that is held down.
        page.send("Input.dispatchKeyEvent", type="keyDown", key="r", text="r", autoRepeat=True)
        page.run("state.saving")
        assert ", marked as right" in page.run("document.querySelector('.card.right').getAttribute('aria-label')")
        page.press("j", "w")
        page.until("document.querySelector('.card.wrong[aria-selected=true]')")
        assert page.run("document.querySelector('#counts').textContent") == "1 right, 1 wrong"
        # Once more takes it back.
        page.press("w")
        page.until("!document.querySelector('.card.wrong')")

        # The chart: to the end of the video by arrow keys.
        page.run("document.querySelector('#chart').focus()")
        page.press("End", "ArrowLeft", "Enter")
        page.until("state.playing.start >= 4")
        assert page.run("document.querySelector('#chart').getAttribute('aria-valuetext')").startswith("0:0")
        # What is no time filters nothing, and the page names it.
        page.run("document.querySelector('#to').value = '1:2:3:4'; search()")
        assert page.run("document.querySelector('#status').textContent").startswith("Not a time, so not a filter")
        assert page.run("document.querySelector('#filters').open && document.querySelectorAll('.card').length")
        page.run("document.querySelector('#to').value = ''; document.querySelector('#filters').open = false; search()")
        # Another moment as the query, and the keys.
        page.press("s")
        page.until("!document.querySelector('#chip').hidden && document.activeElement.matches('.card')")
        page.press("?")
        page.until("document.querySelector('#help').open")
        page.press("Escape")

        # A reload keeps the search and the marks, and another tab has them, too.
        page.press("/", "Escape")
        search(page, "#C C opens the jar")
        page.send("Page.reload")
        page.until("document.querySelector('.card.right')")
        assert page.complaints == []
        assert {request.split("/")[2] for request in page.requests if request.startswith("http")} == {
            address.split("/")[2]
        }
        page.run("fetch('/export/narrations').then((each) => each.text()).then((text) => { window.csv = text; })")
        (tmp_path / "marks.csv").write_text(page.until("window.csv"))

    # What was marked trains: one clip, two steps.
    assert len((tmp_path / "marks.csv").read_text().splitlines()) == 2
    own = [f"data.train.demo.metadata={tmp_path}/marks.csv", f"data.train.demo.root={videos}"]
    own += ["data.train.demo.layout=whole", "data.hard_negatives.share=0", "train.global_batch_size=1"]
    own += [f"train.output={tmp_path}/run", "train.duration=2 steps", "train.warmup=0 steps"]
    done = program("main_finetune.py", *short_run.command, *own)
    assert done.returncode == 0, done.stderr
    assert [step for step, *_ in losses(tmp_path / "run")][-1] == 2


def test_what_browsers_cannot_play_is_played_converted_and_what_is_gone_is_named(
    searchable: Path, tmp_path: Path
) -> None:
    with server(searchable) as address, browser(tmp_path / "chromium") as page:
        page.size(1280, 800)
        for video in ("old", "hevc"):
            page.open("about:blank")
            page.open(f"{address}#q=open+the+jar&video={video}")
            page.until("document.querySelector('.card')")
            page.press("j", "Enter")
            page.until(PLAYS)
            assert "converted stretch" in page.run("document.querySelector('#note').textContent")
            assert page.run("Math.abs(player.currentTime + state.playing.base - state.playing.start) < 2.5")
        page.open("about:blank")
        page.open(f"{address}#q=open+the+jar&video=gone")
        page.until("document.querySelector('.card')")
        page.press("j", "Enter")
        page.until("!document.querySelector('#unplayable').hidden")
        assert "no such file" in page.run("document.querySelector('#unplayable').textContent")
        assert page.complaints == []


def test_a_server_that_has_ended_is_named(searchable: Path, tmp_path: Path) -> None:
    with browser(tmp_path / "chromium") as page:
        with server(searchable) as address:
            page.open(address)
            page.until("document.querySelector('.card')")
        page.press("/", "x", "Enter")
        page.until("document.querySelector('#status').textContent.includes('egohod serve does not answer')")
        page.run("jump(0)")


def test_on_a_phone_with_two_checkpoints(searchable: Path, tmp_path: Path) -> None:
    with server(searchable, searchable) as address, browser(tmp_path / "chromium") as page:
        page.size(375, 812, 2, mobile=True)
        page.open(address)
        page.until("document.querySelectorAll('.column').length === 2")
        search(page, "#C C opens the jar")
        page.press("Enter")
        page.until("state.playing || !document.querySelector('#unplayable').hidden")
        page.run("document.querySelector('#filters').open = true; undefined")
        widths = page.run("[document.documentElement.scrollWidth, innerWidth]")
        assert widths == [375, 375], page.run(
            "[...document.querySelectorAll('*')].filter((each) => each.getBoundingClientRect().right > 376)"
            ".map((each) => each.tagName + '.' + each.className).join(' ')"
        )
        # Every control can be named by a screen reader.
        nameless = page.run(
            "[...document.querySelectorAll('button, input, [role]')].filter((each) => !(each.textContent.trim() || "
            "each.getAttribute('aria-label') || each.labels?.length)).map((each) => each.outerHTML)"
        )
        assert nameless == []
        assert page.complaints == []


def test_a_server_for_other_machines_opens_with_its_token_alone(searchable: Path, tmp_path: Path) -> None:
    with server(searchable, "--host", "127.0.0.1", "--token", "a-token") as address, browser(tmp_path / "c") as page:
        assert address.endswith("/?token=a-token")
        page.open(address.removesuffix("?token=a-token"))
        assert page.run("document.querySelector('h1').textContent") == "This page needs its token"
        page.run("document.querySelector('input').value = 'a-token'; document.querySelector('form').submit()")
        page.until("document.querySelector('.card') && location.search === ''")


def test_a_server_ends_by_itself(new_index: Callable[..., Path], tmp_path: Path, program: Command) -> None:
    index = new_index(tmp_path / "index")
    done = program("tools/serve.py", index, "--port", "0", "--idle", "1")
    assert done.returncode == 0, done.stderr
    assert "no sentences" in done.stderr
    assert "no request for 1 s: stopped" in done.stderr
    # For other machines there is always a token, of 24 random bytes.
    done = program("tools/serve.py", index, "--host", "0.0.0.0", "--port", "0", "--idle", "1")
    assert re.search(r"^open http://\S+:\d+/\?token=[\w-]{32}$", done.stdout)
    assert "token" not in done.stderr
