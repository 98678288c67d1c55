"""Pickles: what is read, and small ones that ask for a lot of memory, in every reader that opens any."""

from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from egohod import pickles
from tests.hostile_files import ANNOTATIONS, MATRICES, SAVED, SIZES, older_file, saved_file, write_training
from tests.support import ROOT, environment


def read_with_little_memory(readers_and_paths: list[tuple[str, Path]]) -> None:
    """Each is read, or refused in a line, soon and with no memory to speak of."""
    arguments = [str(part) for pair in readers_and_paths for part in pair]
    command = [sys.executable, "-m", "tests.hostile_files", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    wrong = []
    for (reader, path), result in zip(readers_and_paths, results, strict=True):
        message = result["message"]
        # Entries that are no clips are counted, not refused.
        fine = message == "read" or (message.startswith(str(path)) and "\n" not in message and len(message) < 500)
        if not fine or "MemoryError" in message or result["seconds"] > 5 or result["grown_mb"] > 300:
            wrong.append((reader, path.name, result))
    assert not wrong


def test_small_files_that_ask_for_a_lot_of_memory(tmp_path: Path) -> None:
    files = []
    for reader, attacks in (("annotations", ANNOTATIONS), ("detections", SIZES), ("relevancy", MATRICES)):
        for name, content in attacks.items():
            path = tmp_path / f"{reader}, {name}.pkl"
            path.write_bytes(content)
            files.append((reader, path))
    for name, content in SAVED.items():
        containers = {
            "zip": saved_file(content),
            "archive": saved_file(content, archive_of_code=True),
            "older": older_file(content),
        }
        for container, whole in containers.items():
            path = tmp_path / f"{container}, {name}.pt"
            path.write_bytes(whole)
            files.append(("weights", path))
        files.append(("boxes", tmp_path / f"zip, {name}.pt"))
        files.append(("training", write_training(tmp_path / f"training, {name}", containers["zip"])))
    for code in (False, True):
        path = tmp_path / f"bomb, {code}.pt"
        path.write_bytes(saved_file(b"\x80\x02]" + b"N0" * 10_000_000 + b".", code, compress=True))
        files.append(("weights", path))
    read_with_little_memory(files)


def test_whatever_python_writes_is_scanned_to_its_end() -> None:
    values = [
        [("v", 1.5, i, "x" * (i % 700)) for i in range(3000)],
        {"a": {1, 2}, b"b": bytearray(b"c" * 300), "d": frozenset({None, True}), "long": 1 << 3000, "é" * 200: -1},
        [np.float64(1.5), np.str_("küche"), np.arange(300.0)],
        [],
    ]
    for value in values:
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            content = pickle.dumps(value, protocol)
            assert pickles.scan(content).end == len(content)
            assert pickles.scan(b"12" + content + b"34", 2).end == 2 + len(content)
            for cut in random.Random(0).choices(range(len(content)), k=20):
                with pytest.raises(EOFError):
                    pickles.scan(content[:cut])


def test_names_and_texts_are_read() -> None:
    scanned = pickles.scan(pickle.dumps([np.float64(1), "x" * 1000, Counter], protocol=2))
    assert scanned.names == {"numpy._core.multiarray.scalar", "numpy.dtype", "_codecs.encode", "collections.Counter"}
    assert 1000 <= scanned.longest < 1010


def test_memo_indices_of_large_files_are_fine(tmp_path: Path) -> None:
    """A million objects in the memo, by index (protocol 2) and as text (protocol 0)."""
    rows = [(f"v{i}", float(i)) for i in range(100_000)]
    for protocol in (0, 2, 5):
        path = tmp_path / f"{protocol}.pkl"
        path.write_bytes(pickle.dumps(rows, protocol))
        assert pickles.load(path, "rows") == rows


def test_arrays_in_lists_and_dicts_are_replaced_once() -> None:
    array = np.arange(6, dtype=np.float16).reshape(2, 3)
    content = [{"hand": {"joints": array}, "score": np.float32(0.5)}]
    loaded = pickles.load(pickle.dumps(content), "hands", arrays=True)
    assert loaded[0]["score"] == 0.5
    np.testing.assert_array_equal(loaded[0]["hand"]["joints"], array)
    itself: list[Any] = [array]
    itself += [itself] * 1000  # written out four deep it would have a billion values
    loaded = pickles.load(pickle.dumps(itself), "hands", arrays=True)
    np.testing.assert_array_equal(loaded[1][1][0], array)
