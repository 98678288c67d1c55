"""The fuzzer: what it damages, that it notices every kind of fault, and that the readers bear some of its cases."""

from __future__ import annotations

import io
import json
import pickle
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tests.fuzz_mutations import mutate
from tests.support import ROOT, environment

# Each is a reader whose every case has another fault.
FAULTS = """
import os, pickle, signal, sys, time
from pathlib import Path
from egohod.config import UserError
from tests import fuzz
from tests.fuzz_targets import Target

def several_lines(folder): raise UserError("one", "two")
class Uncut(UserError):
    def __str__(self): return "word " * 300
def long(folder): raise Uncut
def endless(folder):
    while True:
        try:
            time.sleep(60)
        except Exception:
            pass
def hung(folder):
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    time.sleep(60)
def large(folder): bytearray(fuzz.BYTES + (100 << 20))
def outside(folder):
    try:
        Path(folder.parent, "escaped.txt").write_text("x")
    except RuntimeError:
        raise UserError("swallowed")
def fires(folder): pickle.loads(b"ctests.fuzz_mutations\\nfire\\n)R.")
def system(folder): os.system("true")
readers = {
    "exception": lambda folder: {}["key"], "crash": lambda folder: os.abort(), "leaves": lambda folder: os._exit(0),
    "several_lines": several_lines, "long": long, "endless": endless, "hung": hung, "large": large,
    "outside": outside, "fires": fires, "system": system,
    "read": lambda folder: (folder / "again").write_text("x"),
    "refused": lambda folder: (_ for _ in ()).throw(UserError("a.csv: row 1: no such thing")),
}
fuzz.SECONDS, fuzz._GRACE, fuzz.BYTES, work = 2.0, 1.0, 50 << 20, Path(sys.argv[1])
chosen = [Target(name, lambda folder: (folder / "a.csv").write_text("a,b"), read) for name, read in readers.items()]
notes = {each.name: fuzz.Notes(work / f"{each.name}.json", 0) for each in chosen}
fuzz.run(chosen, 1, 2, 0, work, notes)
again = {each.name: fuzz.Notes(work / f"{each.name}.json", 0) for each in chosen}
fuzz.run(chosen, 1, 2, 0, work, again)  # nothing is left
"""
SEEDS = {
    "a.csv": b'video_id,text\nv,"a, b"\nw,c\n',
    "a.json": b'{"a": [1, {"b": null}]}',
    "a.jsonl": b'{"a": 1}\n{"b": [2]}\n',
    "a.yml": b"a: {b: 1, c: [x, y]}\nd: text\n",
    "a.pkl": pickle.dumps([b"\x08\x01", b"\x12\x03abc"]),
    "a.safetensors": (61).to_bytes(8, "little") + b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}0123',
    "a.bin": bytes(range(200)),
}


def archive() -> bytes:
    held = io.BytesIO()
    np.savez(held, a=np.arange(3.0), b=np.array(["x"]))
    return held.getvalue()


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", [*SEEDS, "a.npz"])
def test_a_case_follows_from_its_number_and_differs_from_the_seed(name: str) -> None:
    seed = SEEDS.get(name) or archive()
    cases = [mutate(seed, name, random.Random(number), [seed]) for number in range(300)]
    assert cases == [mutate(seed, name, random.Random(number), [seed]) for number in range(300)]
    assert len(set(cases)) > 200
    assert sum(case == seed for case in cases) < 30
    assert max(map(len, cases)) <= 4 << 20


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_damage_reaches_what_lies_behind_the_format() -> None:
    def still(case: bytes, name: str) -> bool:
        try:
            return bool(zipfile.ZipFile(io.BytesIO(case)).testzip() is None if name == "a.npz" else [json.loads(case)])
        except Exception:
            return False

    for name in ("a.json", "a.npz"):
        seed = SEEDS.get(name) or archive()
        cases = [mutate(seed, name, random.Random(number)) for number in range(200)]
        assert sum(still(case, name) for case in cases) > 40


@pytest.mark.ci
def test_every_kind_of_fault_is_noticed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, str(tmp_path)], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    chunks = {path.stem: json.loads(path.read_text())["chunks"]["0"] for path in tmp_path.glob("*.json")}
    assert {name: (chunk["read"], chunk["refused"]) for name, chunk in chunks.items() if not chunk["faults"]} == {
        "read": (1, 0),
        "refused": (0, 1),
    }
    messages = {name: [fault["what"] for fault in chunk["faults"]] for name, chunk in chunks.items() if chunk["faults"]}
    assert all(len(each) == 1 for each in messages.values())
    expected = {
        "exception": "KeyError: 'key' at ",
        "crash": "ends the process (SIGABRT)",
        "leaves": "ends the process (exit code 0)",
        "several_lines": "one\ntwo",
        "long": "a message of ",
        "endless": "takes more than",
        "hung": "does not end",
        "large": "takes 0.2 GB of memory",
        "outside": "leaves its folder: open",
        "fires": "runs code of the file",
        "system": "leaves its folder: os.system",
    }
    assert {name: each[0][: len(expected[name])] for name, each in messages.items()} == expected
    assert "--reader crash --case 0" in chunks["crash"]["faults"][0]["command"]
    assert not list(tmp_path.rglob("escaped.txt"))


def fuzz(work: Path, cases: int) -> None:
    command = [sys.executable, "tests/fuzz.py", "--cases", str(cases), "--work", str(work)]
    done = subprocess.run(
        [*command, "--output", str(work / "fuzz.json")], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((work / "fuzz.json").read_text())
    assert result["faults"] == 0
    assert all(each["cases"] == cases for each in result["readers"].values())


def test_every_reader_bears_a_few_cases(tmp_path: Path) -> None:
    fuzz(tmp_path, 2)


@pytest.mark.ci
def test_every_reader_bears_more_cases(tmp_path: Path) -> None:
    fuzz(tmp_path, 100)
