"""tools/bench.py hod_scale: shards, one of them killed, a merge and pages, in real processes."""

from __future__ import annotations

import json
from pathlib import Path

import bench
import pytest

from egohod.errors import UserError


@pytest.mark.ci
def test_a_small_run_is_verified_and_a_rerun_measures_nothing_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, results = tmp_path / "run", tmp_path / "results.json"
    command = ["hod_scale", "--clips", "4000", "--shards", "2", "--folder", str(folder), "--results", str(results)]
    assert bench.main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert json.loads(results.read_text()) == result
    assert (result["narrations"], result["failures"]) == (3996, 4)
    assert result["killed_with_results"] > 2000
    assert set(result["processes"]) >= {
        "shard (highest)",
        "submit",
        "merge",
        "page",
        "page, filtered",
        "page, failures",
    }
    assert all(each["peak_mb"] > each["own_mb"] > 10 for each in result["processes"].values())
    shards = json.loads((folder / "steps.json").read_text())
    (folder / "clips.csv").unlink()
    assert bench.main(command) == 0
    assert json.loads((folder / "steps.json").read_text()) == shards
    assert "4,000 clips on 2 shards" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"steps\.json: of a run with .*; use another --folder"):
        bench.main([*command, "--clips", "5000"])
