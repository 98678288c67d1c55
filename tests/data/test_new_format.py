"""A dataset is added with one module and one line: the example in the documentation of the formats works."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import numpy as np
import pytest

from egohod.data import formats
from egohod.data.config import SourceConfig
from egohod.data.formats import BENCHMARKS, FORMATS, read_clips
from egohod.data.formats.base import BenchmarkOptions, Format
from egohod.errors import UserError
from tests import fuzz_targets

# The parts of the example, by the file that a comment names.
_MODULE, _, _TARGET = re.split(
    r"^# \S+\.py.*$", textwrap.dedent((formats.__doc__ or "").split("::\n")[1].split("\n``base.py``")[0]), flags=re.M
)[1:]


@pytest.fixture
def mydata(monkeypatch: pytest.MonkeyPatch) -> Format:
    """The format of the example, registered as the example describes."""
    names: dict[str, Format] = {}
    exec(_MODULE, names)
    format = names["MYDATA"]
    monkeypatch.setitem(FORMATS, format.name, format)
    for benchmark in format.benchmarks:
        monkeypatch.setitem(BENCHMARKS, benchmark.name, benchmark)
    return format


def test_the_example_of_a_new_format_is_recognised_trained_on_and_evaluated(mydata: Format, tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text("clip,from,to,sentence\nv,0,2,cuts an onion\nv,2,00:00:04,stirs\nw,1,2,stirs\n")
    clips = read_clips(tmp_path / "test.csv")
    assert (clips.videos, clips.end.tolist(), clips.row(1).texts) == (["v", "v", "w"], [2, 4, 2], ("stirs",))
    data = BENCHMARKS[mydata.name].read(SourceConfig(metadata=str(tmp_path)), BenchmarkOptions())
    (task,) = data.tasks
    np.testing.assert_array_equal(task.relevancy, [[1, 0], [0, 1], [0, 1]])


def test_the_fuzz_target_of_the_example_accepts_its_own_file(mydata: Format, tmp_path: Path) -> None:
    target = eval(_TARGET.strip(), vars(fuzz_targets))
    target.seed(tmp_path)
    target.read(tmp_path)


def test_a_format_that_does_not_exist_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "clips.csv").write_text("video_id,start_second,end_second,text\nv,0,1,a\n")
    with pytest.raises(UserError, match=r"clips\.csv: no annotation format 'egoclp' \(did you mean 'egoclip'\?\)"):
        read_clips(SourceConfig(metadata=str(tmp_path / "clips.csv"), format="egoclp"))
