"""The server of ``egohod serve`` without a browser: answers, files, marks, and who may have them."""

from __future__ import annotations

import io
import json
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

pytest.importorskip("fastapi", reason="needs the extra [serve]: pip install fastapi uvicorn")
from fastapi.testclient import TestClient

from egohod.data.config import SourceConfig
from egohod.data.formats import read_clips
from egohod.errors import UserError
from egohod.evaluation.features import Features, best_rows, search, write_video
from egohod.serve.app import Access, create_app, is_loopback, open_socket
from egohod.serve.index import Library, Made, Marks, Moment, Tracks
from tests.data.video_files import brightness, encode, numbers
from tests.serve.conftest import AXES, HOSTILE, VIDEOS, AxisTower, axis, write_index
from tests.support import Command

HOME = "http://127.0.0.1:7860"


@pytest.fixture
def index(new_index: Callable[..., Path], tmp_path: Path) -> Path:
    return new_index(tmp_path / "index")


def library(folder: Path, width: int = AXES) -> Library:
    opened = Library(folder)
    opened.tower = AxisTower(width)  # type: ignore[assignment]
    return opened


def client_of(*libraries: Library, access: Access | None = None, marks: Path | None = None) -> TestClient:
    path = marks or libraries[0].folder / "marks.json"
    app = create_app(libraries, Marks(path), access or Access("127.0.0.1"))
    return TestClient(app, base_url=HOME, follow_redirects=False)


@pytest.fixture
def client(index: Path) -> TestClient:
    return client_of(library(index))


def hits(answer: Any, side: int = 0) -> list[tuple[str, float]]:
    return [(hit["video"], hit["start"]) for hit in answer.json()["sides"][side]["hits"]]


# --- Search ---


def test_sentences_moments_and_filters_rank_moments(client: TestClient) -> None:
    # Second 3 of the first video and second 2 of the next are both like axis 3.
    found = hits(client.get("/api/search", params={"q": "axis 3", "top": 4}))
    assert set(found) == {("kitchen/a", 3.0), (HOSTILE, 2.0), ("hevc", 1.0), ("old", 0.0)}
    assert hits(client.get("/api/search", params={"q": "axis 3", "video": "KITCHEN"}))[0] == ("kitchen/a", 3.0)
    late = {"q": "axis 3", "from": 4.5, "to": 5, "top": 50, "overlapping": True}
    assert {start for _, start in hits(client.get("/api/search", params=late))} == {3.0, 4.0}
    all_of_a = {"q": "axis 3", "video": "kitchen", "top": 50}
    assert len(hits(client.get("/api/search", params=all_of_a))) == 2
    assert len(hits(client.get("/api/search", params=all_of_a | {"overlapping": True}))) == 5
    like = client.get("/api/search", params={"side": 0, "row": 3, "top": 2})
    assert hits(like)[0] == ("kitchen/a", 3.0)
    assert like.json()["sides"][0]["hits"][0]["similarity"] == pytest.approx(1, abs=1e-5)
    assert len(hits(client.get("/api/search", params={"top": 4}))) == 4  # nothing is wanted yet: some of them


def test_two_checkpoints_answer_beside_each_other(index: Path, new_index: Callable[..., Path], tmp_path: Path) -> None:
    # Another width of features and other windows.
    other = library(new_index(tmp_path / "other", width=16, seconds=1.0), 16)
    client = client_of(library(index), other)
    answer = client.get("/api/search", params={"q": "axis 4", "video": "kitchen", "top": 1})
    assert hits(answer) == hits(answer, 1) == [("kitchen/a", 4.0)]
    same = client.get("/api/search", params={"side": 0, "row": 4, "top": 1}).json()["sides"][1]["hits"][0]
    assert (same["video"], same["start"], same["similarity"]) == ("kitchen/a", 4.0, pytest.approx(1, abs=1e-5))
    chart = client.get("/api/chart", params={"video_side": 1, "video_row": 4, "q": "axis 4"}).json()
    assert [len(line) for line in chart["lines"]] == [5, 5]
    assert chart["end"] == 5
    assert max(chart["lines"][1], key=lambda point: point[1])[0] == 4.5
    at = client.get("/api/at", params={"video_side": 1, "video_row": 4, "second": 2.4}).json()
    assert at["start"] == 2.0


def test_without_a_text_tower_moments_are_still_queries(index: Path, inside: Command) -> None:
    opened = Library(index)
    assert opened.tower is None
    client = client_of(opened)
    assert "config.yml" in client.get("/api/library").json()["sides"][0]["no_text"]
    assert "config.yml" in client.get("/api/search", params={"q": "axis 1"}).json()["sides"][0]["error"]
    assert hits(client.get("/api/search", params={"row": 0, "top": 1})) == [("kitchen/a", 0.0)]


def test_a_hundred_thousand_moments_stay_on_disk(tmp_path: Path) -> None:
    rng, videos = np.random.default_rng(0), [f"day {i}" for i in range(20)]
    folder = tmp_path / "index"
    (tmp_path / "videos").mkdir()
    write_index(folder, tmp_path / "videos", videos)
    for video in videos:
        features = rng.standard_normal((5000, 32)).astype(np.float32)
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        start = np.arange(5000.0)
        np.savez(folder / f"{video}.npz", features=features, start=start, end=start + 2, text=np.full(5000, ""))
    opened = Library(folder)
    assert len(opened.features.videos) == 100_000
    assert not opened.features.features.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        opened.features.features[0, 0] = 1
    rows, similarity = opened.search(opened.features.features[70_123], 50)
    assert rows[0] == 70_123
    assert opened.missing == videos
    expected = search(opened.features.features[70_123], opened.features, 50)
    assert [(hit.video, hit.start) for hit in expected] == [
        (opened.features.videos[row], opened.features.start[row]) for row in rows
    ]
    assert len(opened.chart(similarity, "day 14")) == 600
    assert max(opened.chart(similarity, "day 14"), key=lambda point: point[1]) == [124.0, 1.0]


def test_the_best_rows_are_those_of_a_plain_search() -> None:
    rng = np.random.default_rng(1)
    videos = [name for name in "abc" for _ in range(40)]
    start = np.concatenate([np.sort(rng.uniform(0, 30, 40)) for _ in range(3)])
    index = Features(rng.standard_normal((120, 4)).astype(np.float32), videos, start, start + 2, [""] * 120)
    similarity = index.features @ axis(0, 4)
    chosen: list[int] = []
    for row in np.argsort(-similarity, kind="stable").tolist():
        if all(videos[row] != videos[each] or abs(start[row] - start[each]) >= 2 for each in chosen):
            chosen.append(row)
    assert best_rows(similarity, index, 1000) == chosen
    assert best_rows(similarity, index, 3, allowed=start > 20) == best_rows(
        np.where(start > 20, similarity, -9).astype(np.float32), index, 3
    )


# --- Videos ---


def test_a_file_is_sent_in_ranges_and_never_by_its_path(client: TestClient, videos: Path) -> None:
    content = (videos / "kitchen" / "a.mp4").read_bytes()
    whole = client.get("/video/0/2")
    assert (whole.status_code, whole.content, whole.headers["content-type"]) == (200, content, "video/mp4")
    part = client.get("/video/0/2", headers={"Range": "bytes=100-199"})
    assert (part.status_code, part.content) == (206, content[100:200])
    assert part.headers["content-range"] == f"bytes 100-199/{len(content)}"
    assert client.get("/video/0/2", headers={"Range": "bytes=-7"}).content == content[-7:]
    assert client.get("/video/0/2", headers={"Range": f"bytes={len(content)}-"}).status_code == 416
    for path in ("/video/0/25", "/video/0/-1", "/video/2/0", "/video/-1/0", "/thumbnail/0/99999999999999999999"):
        assert client.get(path).status_code in (404, 422), path
    for path in ("/video/0/..%2f..%2fetc%2fpasswd", "/..%2f..%2fetc/passwd", "/app.py", "/page.html", "/video/0/a.mp4"):
        assert client.get(path).status_code in (404, 422), path


def test_of_a_file_of_gigabytes_only_the_range_is_read(tmp_path: Path) -> None:
    root = tmp_path / "videos"
    root.mkdir()
    encode(root / "big.mp4", 60, size=(160, 120), faststart=True)
    with (root / "big.mp4").open("r+b") as file:
        file.truncate(3 << 30)  # sparse: it takes no space
    client = client_of(library(write_index(tmp_path / "index", root, ["big"])))
    part = client.get("/video/0/0", headers={"Range": f"bytes={(3 << 30) - 4}-"})
    assert (part.status_code, part.content) == (206, b"\0\0\0\0")
    assert part.headers["content-range"].endswith(f"/{3 << 30}")


@pytest.mark.parametrize(("video", "why"), [("old", "avi"), ("hevc", "HEVC")])
def test_what_browsers_do_not_play_is_converted_around_the_moment(client: TestClient, video: str, why: str) -> None:
    row = 5 * list(VIDEOS).index(video) + 3
    moment = client.get(f"/api/moment/0/{row}").json()
    assert moment["file"] is None
    assert why in moment["why"]
    assert client.get(f"/video/0/{row}").status_code == 404
    reply = client.get(moment["stretch"])
    assert reply.headers["content-type"] == "video/mp4"
    with av.open(io.BytesIO(reply.content)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.width, stream.height) == ("h264", 160, 120)
        shown = list(container.decode(stream))
    # From two seconds before the moment to the end of the video, at its speed.
    assert moment["stretch_start"] == 1.0
    assert shown[-1].time == pytest.approx(4.9, abs=0.05)
    bars = np.array([frame.to_ndarray(format="rgb24")[4:56, 8:-8].mean() for frame in shown])
    # An AVI file has no times of display, and its pictures leave the decoder two later than they are numbered.
    first = 12 if video == "old" else 10
    expected = np.array([brightness(number) for number in range(first, first + 40)])
    assert np.abs(bars[:40] - expected).max() < 8
    assert client.get(moment["stretch"], headers={"Range": "bytes=0-3"}).status_code == 206


def test_a_thumbnail_shows_frames_of_the_moment_side_by_side(client: TestClient) -> None:
    reply = client.get("/thumbnail/0/2")
    assert reply.headers["content-type"] == "image/jpeg"
    with av.open(io.BytesIO(reply.content)) as container:
        picture = next(container.decode(video=0)).to_ndarray(format="rgb24")
    # Their middle, as JPEG blurs their borders.
    width = picture.shape[1] // 4
    frames = np.stack([picture[:, i * width : (i + 1) * width] for i in range(4)])
    assert [20 <= number < 40 for number in numbers(frames)] == [True] * 4
    assert numbers(frames) == sorted(numbers(frames))


def test_a_video_that_is_gone_is_listed_and_the_others_work(client: TestClient) -> None:
    assert client.get("/api/library").json()["sides"][0]["missing"] == ["gone"]
    row = 5 * list(VIDEOS).index("gone")
    assert ("gone", 0.0) in hits(client.get("/api/search", params={"q": "axis 4", "top": 50}))
    # No errors of the page: a console full of them would hide those that matter.
    assert "no such file" in client.get(f"/api/moment/0/{row}").json()["error"]
    reply = client.get(f"/thumbnail/0/{row}")
    assert (reply.status_code, reply.headers["content-type"]) == (200, "image/svg+xml")
    assert client.get(f"/video/0/{row}").status_code == 404
    assert client.get("/api/moment/0/0").json()["file"] == "/video/0/0"


def test_what_is_no_video_is_not_sent_whatever_an_index_says(tmp_path: Path) -> None:
    root = tmp_path / "videos"
    root.mkdir()
    (root / "secret.mp4").write_text("password")
    client = client_of(library(write_index(tmp_path / "index", root, ["secret"])))
    reply = client.get("/video/0/0")
    assert reply.status_code == 404
    assert "not a video" in reply.json()["error"]
    assert "password" not in reply.text


def test_moments_of_chunks_have_the_hands_of_the_hod_pipeline(
    demo_world: Path, tmp_path: Path, inside: Command
) -> None:
    world, output = demo_world / "test", tmp_path / "hod.csv"
    command = ["--config_file", "configs/hod/demo.yml", "--metadata", world / "narrations.csv", "--root"]
    command += [world / "videos", "--output", output, f"detector.options.path={world}/detections.parquet"]
    done = inside("generate_hod", *command, "demo.folder=null", "workers=0", "keep=[]")
    assert done.returncode == 0, done.stderr
    tracks = Tracks(output)
    table = read_clips(SourceConfig(metadata=str(output), root="videos"))
    row = next(row for row in map(table.row, range(len(table))) if row.start >= 15)
    # An index of chunks: the file of a moment begins at a multiple of 15 s.
    index = write_index(tmp_path / "index", world / "videos", [row.video_id])
    settings = json.loads((index / "index.json").read_text()) | {"layout": "auto"}
    (index / "index.json").write_text(json.dumps(settings))
    start = np.array([row.start])
    write_video(index, row.video_id, axis(0)[None], start, np.array([row.end]), [""], "id")
    app = create_app([library(index)], Marks(tmp_path / "marks.json"), Access("127.0.0.1"), tracks)
    client = TestClient(app, base_url=HOME)
    assert client.get("/api/library").json()["tracks"]
    moment = client.get("/api/moment/0/0").json()
    assert moment["file_start"] == 15 * (row.start // 15)
    assert moment["stretch_start"] >= moment["file_start"]
    (clip,) = (each for each in moment["tracks"] if each["start"] == pytest.approx(row.start))
    assert clip["text"] == row.texts[0]
    assert clip["paths"].keys() <= {"left", "right", "object"}
    assert all(len(path) == len(clip["times"]) for path in clip["paths"].values())
    assert {box["role"] for box in clip["boxes"]} <= {"left", "right", "object"}
    assert all(row.start <= second <= row.end for second in clip["times"])
    with pytest.raises(UserError, match="--hod is the --output"):
        Tracks(tmp_path / "other.csv")


# --- Marks ---


def test_marks_are_saved_at_once_and_exported_for_the_projects_readers(client: TestClient, index: Path) -> None:
    def mark(row: int, label: str, value: str | None) -> Any:
        return client.post("/api/marks", json={"side": 0, "row": row, "label": label, "mark": value})

    assert mark(0, " opens the jar ", "right").json()["counts"] == {"right": 1, "wrong": 0}
    mark(5, 'a "quoted", label', "right")
    mark(1, "opens the jar", "wrong")
    mark(0, "closes the jar", "wrong")
    mark(2, "a slip", "right")
    assert mark(2, "a slip", None).json()["marks"] == {}
    for label in (" ", "two\nlines", "two\u2028lines", "nothing\0", "=1+1", "@cmd"):
        assert mark(0, label, "right").status_code == 400
    assert mark(0, "x", "perhaps").status_code == 422
    assert mark(99, "x", "right").status_code == 404
    first = client.get("/api/search", params={"row": 0, "top": 1}).json()["sides"][0]["hits"][0]
    assert first["marks"] == {"opens the jar": "right", "closes the jar": "wrong"}
    assert Marks(index / "marks.json").counts() == {"right": 2, "wrong": 2}

    narrations, labels = index / "narrations.csv", index / "labels.csv"
    narrations.write_bytes(client.get("/export/narrations").content)
    labels.write_bytes(client.get("/export/labels").content)
    table = read_clips(SourceConfig(metadata=str(narrations), root="videos"), extra=["wrong"])
    assert [(row.video_id, row.start, row.end, row.texts[0]) for row in map(table.row, range(len(table)))] == [
        (HOSTILE, 0.0, 2.0, 'a "quoted", label'),
        ("kitchen/a", 0.0, 2.0, "opens the jar"),
    ]
    assert json.loads(table.value("wrong", 1)) == ["closes the jar"]
    table = read_clips(SourceConfig(format="labels", metadata=str(labels), root="videos"))
    assert table.column("label").tolist() == ['a "quoted", label', "opens the jar"]
    assert client.get("/export/secrets").status_code == 422


def test_a_name_with_a_lone_return_is_one_field(tmp_path: Path) -> None:
    marks = Marks(tmp_path / "marks.json")
    marks.set(Moment.of("a\rb", 0, 1), "=1+1", "right")
    (tmp_path / "labels.csv").write_bytes(marks.to_csv("labels", lambda video: 0).encode())
    table = read_clips(SourceConfig(format="labels", metadata=str(tmp_path / "labels.csv"), root="videos"))
    assert (table.row(0).video_id, table.column("label").tolist()) == ("a\rb", ["=1+1"])


def test_servers_that_share_a_file_lose_no_mark(tmp_path: Path) -> None:
    one, two = Marks(tmp_path / "marks.json"), Marks(tmp_path / "marks.json")
    for number in range(4):
        (one, two)[number % 2].set(Moment.of("v", number, np.inf), "cut", "right")
    assert Marks(tmp_path / "marks.json").counts()["right"] == 4
    # A whole video ends where it is measured to end; one that is gone is left out.
    assert "v,0.0,7.5,cut" in one.to_csv("labels", lambda video: 7.5)


@pytest.mark.parametrize("content", ["{", '{"format": 1, "marks": [{"video": "a"}]}', '{"format": 9}'])
def test_a_damaged_file_of_marks_is_named_and_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "marks.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"marks\.json"):
        Marks(path)
    assert path.read_text() == content


# --- Access ---


def test_only_this_machine_is_answered_and_only_this_page(client: TestClient) -> None:
    assert client.get("/").status_code == 200
    # A name of a stranger's page that leads to this machine.
    assert client.get("/api/library", headers={"Host": "evil.example"}).status_code == 403
    content = {"side": 0, "row": 0, "label": "x", "mark": "right"}
    assert client.post("/api/marks", json=content, headers={"Origin": "http://evil.example"}).status_code == 403
    assert client.post("/api/marks", json=content, headers={"Origin": HOME}).status_code == 200
    # Pictures in a page elsewhere have no Origin, but browsers say where they are.
    for site, mode, status in (
        ("cross-site", "no-cors", 403),
        ("same-site", "cors", 403),
        ("cross-site", "navigate", 200),
    ):
        headers = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode}
        assert client.get("/thumbnail/0/0", headers=headers).status_code == status
    # What is no address at all is an answer, no traceback.
    assert client.get("/api/library", headers={"Host": "[::1"}).status_code == 400
    assert client.post("/api/marks", json=content, headers={"Origin": "http://[::1"}).status_code == 400
    assert is_loopback("localhost")
    assert is_loopback("::1")
    assert not is_loopback("0.0.0.0")


def test_other_machines_need_the_token(index: Path) -> None:
    access = Access("0.0.0.0", "the-token")
    client = client_of(library(index), access=access)
    client.base_url = "http://workstation:7860"  # type: ignore[assignment]
    page = client.get("/")
    assert page.status_code == 401
    assert "Token" in page.text
    assert client.get("/page.css").status_code == 200
    for path in ("/page.js", "/api/library", "/video/0/0", "/export/labels"):
        assert client.get(path).status_code == 401, path
    wrong = client.get("/api/library", headers={"Authorization": "Bearer the-tokem"})
    assert wrong.json()["error"].startswith("The token is wrong")
    assert client.get("/api/library", headers={"Authorization": "Bearer ünïcode".encode()}).status_code == 401
    assert client.get("/api/library", headers={"Authorization": "Bearer the-token"}).status_code == 200
    # The printed address sets a cookie and leaves the address bar.
    opened = client.get("/?token=the-token")
    assert (opened.status_code, opened.headers["location"]) == (303, "/")
    assert "HttpOnly" in opened.headers["set-cookie"]
    assert "samesite=strict" in opened.headers["set-cookie"].lower()
    assert client.get("/api/library").status_code == 200


@pytest.mark.parametrize("token", ["plain", 'a+b&c="d"; e', "пароль"])
def test_the_cookie_holds_any_token_and_stands_cookies_of_others(index: Path, token: str) -> None:
    client = client_of(library(index), access=Access("0.0.0.0", token))
    (cookie,) = client.get("/", params={"token": token}).headers["set-cookie"].split("; ")[:1]
    client.cookies.clear()
    # Cookies of all ports of a host come together, whatever their programs put in them.
    for other in ('j={"x": 1, "y": [2]}', "a b=1", 'q="open', "=", "k@v=3"):
        assert client.get("/api/library", headers={"Cookie": f"{other}; {cookie}"}).status_code == 200, other
    assert client.get("/api/library", headers={"Cookie": f"{cookie}x"}).status_code == 401


def test_pictures_that_take_long_leave_threads_for_searches(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each search leaves six requests behind that the browser gave up, and there are forty threads."""
    release, opened = threading.Event(), library(index)
    monkeypatch.setattr(opened, "write_thumbnail", lambda row, path: (release.wait(60), path.write_bytes(b"x")))
    app = create_app([opened], Marks(index / "marks.json"), Access("127.0.0.1"))
    with TestClient(app, base_url=HOME) as client, ThreadPoolExecutor(64) as threads:
        try:
            pictures = [threads.submit(client.get, f"/thumbnail/0/{row % 25}?{row}") for row in range(60)]
            time.sleep(0.5)
            assert threads.submit(client.get, "/api/search?row=3").result(30).status_code == 200
            assert not any(picture.done() for picture in pictures)
        finally:
            release.set()
        assert {picture.result(60).content for picture in pictures} == {b"x"}


def test_pictures_take_no_more_than_their_room_and_belong_to_one_start(tmp_path: Path, index: Path) -> None:
    made, written = Made(most=25), list[Path]()

    def write(path: Path) -> None:
        written.append(path)
        path.write_bytes(b"x" * 10)

    for name in ("a", "b", "a", "c"):  # a was wanted again, so b is the oldest
        made.get(name, write)
    assert [(path.name, path.exists()) for path in written] == [("a", True), ("b", False), ("c", True)]
    made.close()
    assert not written[0].parent.exists()
    # A browser keeps pictures for an hour: a server of another index, on the same port, must not get those.
    one, other = (client_of(library(index)).get("/api/library").json()["started"] for _ in range(2))
    assert one != other


def test_bodies_are_small_and_every_answer_has_security_headers(client: TestClient) -> None:
    assert client.post("/api/marks", content=b"x" * (1 << 20)).status_code == 413
    assert client.post("/api/marks", headers={"Content-Length": str(2 << 30)}, content=b"x").status_code == 413
    assert client.post("/api/marks", content=iter([b"x"])).status_code == 411
    assert client.get("/api/search", params={"q": "x" * 2000}).status_code == 422
    for path in ("/", "/page.js", "/api/library", "/nothing", "/video/0/0", "/thumbnail/0/0"):
        headers = client.get(path).headers
        assert headers["content-security-policy"].startswith("default-src 'none'"), path
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] in ("no-store", "private, max-age=0", "private, max-age=3600")
    for path in ("/docs", "/openapi.json", "/redoc"):
        assert client.get(path).status_code == 404


def test_the_page_names_no_other_server() -> None:
    import egohod.serve

    folder = Path(egohod.serve.__file__).parent
    text = "".join((folder / name).read_text() for name in ("page.html", "page.css", "page.js"))
    assert "https:" not in text
    assert [line for line in text.splitlines() if "http:" in line] == ['const SVG = "http://www.w3.org/2000/svg";']
    # Text from outside never becomes markup.
    assert "innerHTML" not in text


# --- Starting ---


def test_a_port_that_is_taken_is_named_before_anything_is_loaded(index: Path, inside: Command) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = inside("serve", index, "--port", port)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "--port 0" in done.stderr
    with pytest.raises(UserError, match=r"cannot listen on 192\.0\.2\.1:0"):
        open_socket("192.0.2.1", 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "b", "c"], "one folder or two"),
        (["a", "--checkpoint", "x", "--checkpoint", "y"], "--checkpoint is given 2 times for 1 folders"),
        (["nowhere", "--port", "0"], "nowhere/index.json: No such file"),
        (["a", "--port", "70000"], "--port must be 0 to 65535"),
    ],
)
def test_mistakes_are_one_line(inside: Command, arguments: list[str], message: str) -> None:
    done = inside("serve", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("how", ["cut", "nan", "times", "far", "before", "text", "name", "index", "root"])
def test_a_damaged_index_is_named(index: Path, tmp_path: Path, how: str) -> None:
    path = index / "old.npz"
    if how == "cut":
        path.write_bytes(path.read_bytes()[:200])
    elif how in ("nan", "times"):
        features = np.full((1, AXES), np.nan if how == "nan" else 1, np.float32)
        np.savez(path, features=features, start=np.full(1, np.nan), end=np.ones(1), text=np.array([""]))
    elif how in ("far", "before", "text"):
        start, text = {"far": 1e300, "before": -1.0}.get(how, 0.0), "\ud800" if how == "text" else ""
        write_video(index, "old", axis(0)[None], np.array([start]), np.array([np.inf]), [text], "id")
    elif how == "name":
        index = write_index(tmp_path / "other", tmp_path, ["caf\udce9"])
    elif how == "index":
        path = index / "index.json"
        path.write_bytes(path.read_bytes()[:50])
    else:
        path = index / "index.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"root": "/nowhere/at all"}))
    message = {"cut": r"old\.npz", "index": r"index\.json", "root": "--videos", "name": r"'caf\\udce9': .* not UTF-8"}
    message |= dict.fromkeys(("nan", "times"), "the features or times of old are not finite")
    message |= {"text": "a text of old is not Unicode"} | dict.fromkeys(("far", "before"), "impossible times in old")
    with pytest.raises(UserError, match=message[how]):
        Library(index)
