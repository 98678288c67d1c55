"""Relevancy from csvs: by definition, on the real files, and what is refused."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from egohod.data.formats.ek100 import GradedTexts, cached_matrix, class_relevancy, csv_relevancy, read_relevancy
from egohod.errors import UserError
from tests.support import ROOT

CLIPS = """extra,all_noun_classes,verb_class,narration,narration_id
x,"[1, 2]",0,take a and b,c0
x,[2],0,take b,c1
x,[3],5,"cut, c",c2
"""
SENTENCES = "narration_id,narration\nc0,take a and b\nc2,cut c\n"


def write(folder: Path, clips: str = CLIPS, sentences: str = SENTENCES) -> tuple[Path, Path]:
    paths = folder / "clips.csv", folder / "sentences.csv"
    for path, text in zip(paths, (clips, sentences), strict=True):
        path.write_bytes(text.replace("\n", "\r\n").encode("utf-8-sig"))
    return paths


def cached(files: tuple[Path, Path], cache: Path) -> np.ndarray:
    return cached_matrix(cache, files, lambda: csv_relevancy(*files))


def test_half_for_the_verb_and_half_for_the_nouns(tmp_path: Path) -> None:
    want = [[1, 0], [0.75, 0], [0, 1]]
    np.testing.assert_array_equal(csv_relevancy(*write(tmp_path)), want)
    own = "narration,noun_classes,verb_class,narration_id\nany,[2],0,t0\nany,[],5,t1\n"
    np.testing.assert_array_equal(csv_relevancy(*write(tmp_path, sentences=own)), [[0.75, 0], [1, 0], [0, 0.5]])


def test_empty_sets_of_nouns_have_nothing_in_common() -> None:
    verbs = np.array([1, 2])
    clips, texts = (GradedTexts(["", ""], verbs, nouns) for nouns in ([[], [1]], [[], []]))
    assert class_relevancy(clips, texts).tolist() == [[0.5, 0], [0, 0.5]]


def test_the_real_annotation_gives_the_published_matrix(shared: Path, tmp_path: Path) -> None:
    folder = shared / "annotations/epic-kitchens-100/retrieval_annotations"
    files = folder / "EPIC_100_retrieval_test.csv", folder / "EPIC_100_retrieval_test_sentence.csv"
    matrix = cached(files, tmp_path)
    assert matrix.shape == (9668, 3842)
    assert len(np.unique(matrix)) == 18
    assert 100 * np.mean(matrix == 1) == pytest.approx(0.168, abs=5e-4)
    assert matrix.sum(dtype=np.float64) == pytest.approx(2_040_309.23, abs=0.005)
    (file,) = tmp_path.iterdir()
    assert np.array_equal(np.load(file), matrix)


def test_the_cache_belongs_to_the_files_content(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = cached(write(tmp_path), cache)
    assert np.array_equal(cached(write(tmp_path), cache), first)
    assert len(list(cache.iterdir())) == 1
    other = cached(write(tmp_path, clips=CLIPS.replace(",5,", ",0,")), cache)
    assert not np.array_equal(other, first)
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("verb_class", "werb_class"), r"clips\.csv: column 'verb_class' is missing \(did you mean 'werb_class'"),
        (("c1", "c0"), r"clips\.csv: row 2: narration_id 'c0' occurs twice"),
        (("[2],0", "[2],zero"), r"clips\.csv: row 2: verb_class is 'zero', not a whole number"),
        (("[3]", "__import__('os')"), r"clips\.csv: row 3: all_noun_classes is '__import__\('os'\)', not a list"),
        (("c2", "c9"), r"sentences\.csv: row 2: narration_id 'c2' is not in .*clips\.csv"),
    ],
)
def test_a_bad_csv_is_refused_with_its_row(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        csv_relevancy(*write(tmp_path, clips=CLIPS.replace(*change)))


def test_empty_and_missing_files_are_refused(tmp_path: Path) -> None:
    clips, sentences = write(tmp_path, sentences="narration_id,narration\n")
    with pytest.raises(UserError, match=r"sentences\.csv: not a single row"):
        csv_relevancy(clips, sentences)
    with pytest.raises(UserError, match=r"none\.csv: cannot be read: No such file"):
        csv_relevancy(tmp_path / "none.csv", sentences)


@pytest.mark.parametrize("protocol", [2, 5])
def test_published_pickles_are_read_and_hostile_ones_do_nothing(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "relevancy.pkl"
    path.write_bytes(pickle.dumps(np.eye(3), protocol))
    assert np.array_equal(read_relevancy(path), np.eye(3))

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path}/executed",)

    for content in (Evil(), np.array([Evil()], dtype=object)):
        path.write_bytes(pickle.dumps(content, protocol))
        with pytest.raises(UserError, match=r"refused: it asks for .*system|type 'O8' is no plain number"):
            read_relevancy(path)
    for matrix in (np.arange(12.0).reshape(3, 4), np.ones((4, 3), ">f4").T):
        path.write_bytes(pickle.dumps(matrix, protocol))
        assert np.array_equal(read_relevancy(path), matrix)
    assert not (tmp_path / "executed").exists()
    path.write_bytes(pickle.dumps([1, 2], protocol))
    with pytest.raises(UserError, match="holds no matrix"):
        read_relevancy(path)


def test_the_tool_writes_and_compares(tmp_path: Path) -> None:
    clips, sentences = write(tmp_path)
    command = [sys.executable, "tools/build_relevancy.py", "--clips", clips, "--sentences", sentences]
    more = ["--output", tmp_path / "out.npy", "--compare", tmp_path / "published.pkl"]
    (tmp_path / "published.pkl").write_bytes(pickle.dumps(np.array([[1, 0], [0.75, 0], [0, 0.5]])))
    done = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "3 clips x 2 sentences, 3 distinct values, 33.333 % exactly 1, sum 2.75" in done.stdout
    assert "largest difference to published.pkl: 5.0e-01" in done.stdout
    assert np.load(tmp_path / "out.npy").shape == (3, 2)
    bad = subprocess.run([*command[:-1], "none.csv"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (bad.returncode, bad.stderr.startswith("error: none.csv: cannot be read")) == (2, True)


def test_a_damaged_matrix_of_the_cache_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = cached(write(tmp_path), tmp_path)
    (file,) = tmp_path.glob("relevancy-*.npy")
    for content in (file.read_bytes()[:-3], b"", b"\x80\x04N."):
        file.write_bytes(content)
        np.testing.assert_array_equal(cached(write(tmp_path), tmp_path), first)
    assert caplog.text.count("computed again") == 3
