"""What the programs share: a closed output, names that cannot be printed, packages that are missing."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from egohod import cli
from tests.support import ROOT, environment

PROGRAMS = {
    "prints much": "cli.run(lambda _: [print(i) for i in range(100_000)] and 0, [])",
    "prints little": "cli.run(lambda _: [print(i, flush=i == 0) or time.sleep(0.3) for i in range(3)] and 0, [])",
    "prints and then fails": "cli.run(lambda _: [print(i) for i in range(100_000)] and 1 / 0, [])",
    "logs": "logging.basicConfig(handlers=[cli.LogOutput()], level=20) or "
    "cli.while_read(lambda: [logging.info(i) for i in range(100_000)] and 0)",
    "helps": "cli.run(lambda args: cli.parser('', 'x').parse_args(args) and 0, ['--help'])",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_reader_that_leaves_ends_a_program_without_a_word(name: str) -> None:
    """As in ``tools/search.py ... | head -1``."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"import logging, sys, time; from egohod import cli; sys.exit({PROGRAMS[name]})"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=environment(),
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    # What the help's reader did not take may have been written before it left.
    assert process.wait(60) in ((cli.UNREAD, 0) if name == "helps" else (cli.UNREAD,))


def test_another_broken_pipe_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    def program(_: object) -> int:
        reader, writer = os.pipe()
        os.close(reader)
        os.write(writer, b"x")
        return 0

    assert cli.run(program, []) == cli.BROKEN
    assert "Broken pipe" in capsys.readouterr().err


def test_every_program_ends_this_way() -> None:
    for path in [*ROOT.glob("tools/*.py"), *ROOT.glob("main_*.py")]:
        text = path.read_text(encoding="utf-8")
        if "__main__" in text and path.name != "house.py":  # which needs nothing of the project
            assert re.search(r"cli\.run\(main\)|cli\.while_read\(main\)|run_tool\(main", text), path


def test_names_that_are_not_utf8() -> None:
    """Python replaces them by characters that can be neither printed nor written."""
    name = os.fsdecode(b"caf\xe9.mp4")
    code = "import sys; from egohod import cli; sys.exit(cli.run(lambda args: {}, sys.argv[1:]))"
    for body, expected in (("print(args[0]) or 0", (0, "caf\\udce9.mp4", "")), ("args[0].encode() and 0", (2, "", ""))):
        done = subprocess.run(
            [sys.executable, "-c", code.format(body), name],
            capture_output=True,
            cwd=ROOT,
            env=environment(),
            text=True,
            check=False,
            timeout=60,
        )
        assert (done.returncode, done.stdout.strip()) == expected[:2]
        if done.returncode:
            assert done.stderr == "error: b'caf\\xe9.mp4': a name that is not UTF-8; rename the file or folder\n"


def test_a_package_that_a_command_needs_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def needs(name: str) -> int:
        raise ModuleNotFoundError(f"No module named '{name}'", name=name)

    assert cli.run(lambda _: needs("submitit"), []) == cli.USER_ERROR
    error = capsys.readouterr().err
    assert error == (
        "error: a package that this command needs cannot be imported: No module named 'submitit'; pip install -r "
        "requirements.txt\n"
    )
    monkeypatch.setattr(cli, "IS_CHECKOUT", False)  # as where a wheel is installed
    assert cli.run(lambda _: needs("submitit"), []) == cli.USER_ERROR
    assert capsys.readouterr().err.endswith("; pip install 'egohod[all]'\n")
    # A fault of our own stays one.
    with pytest.raises(ModuleNotFoundError):
        cli.run(lambda _: needs("egohod.nothing"), [])
