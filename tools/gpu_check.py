"""Check and measure this machine's GPU: what loads, what is exact, and what every recipe costs on it.

python tools/gpu_check.py                           # everything, at most 8 minutes; results in gpu_check/
python tools/gpu_check.py --out results/a100        # rerun to resume: finished parts are not run again
python tools/gpu_check.py --only attention peer --fresh
python tools/gpu_check.py --device cpu --tiny       # every part with small models, to test the tool itself

Each part runs in a process of its own with a time limit, so that a crash or a lack of memory ends that part alone; rows
that it had measured are in the results, a JSON file and a Markdown table in --out (docs/gpu.md explains them). Exit
code 1: a part or a row failed. Without a GPU there is nothing to check, which is no failure.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _common import markdown_table, run_tool, tool_parser
from benches import gpu, gpu_runs
from benches.gpu import Check, Row

from egohod.distributed import pick_device, require_kernels, setup, source_hash
from egohod.errors import BROKEN, DONE, UserError
from egohod.runtime import write_text


class Part(NamedTuple):
    """What is measured, and the seconds that it may take, its start included."""

    run: Callable[[Check], Iterator[Row]]
    limit: int


# The limits add up to eight minutes. What a first day needs first comes first: if time is short, the last parts are
# those that only compare.
PARTS = {
    "machine": Part(gpu.machine, 20),
    "parity": Part(gpu.parity, 30),
    "steps": Part(gpu.steps, 55),
    "waits": Part(gpu.waits, 15),
    "resume": Part(gpu_runs.resume, 35),
    "deterministic": Part(gpu_runs.deterministic, 25),
    "loader": Part(gpu_runs.loader, 35),
    "evaluation": Part(gpu_runs.evaluation, 45),
    "collectives": Part(gpu_runs.collectives, 15),
    "attention": Part(gpu.attention, 15),
    "egovideo": Part(gpu.egovideo, 20),
    "accumulation": Part(gpu.accumulation, 15),
    "checkpointing": Part(gpu.checkpointing, 45),
    "settings": Part(gpu.settings, 15),
    "compiled": Part(gpu.compiled, 40),
    "peer": Part(gpu.peer, 55),
}
DONE_STATUS = "done"
# Last lines of a failed part's output that are shown.
LINES_SHOWN = 15
# Seconds that processes have to end after a signal.
GRACE = 5.0


def main(argv: Sequence[str]) -> int:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("gpu_check"), metavar="FOLDER", help="of the results (default: gpu_check)")
    add("--only", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    add("--fresh", action="store_true", help="run parts again that are finished")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--tiny", action="store_true", help="small models and few clips: a test of the tool, not of the GPU")
    add("--time_factor", type=float, default=1.0, help="multiplies the time limits, for slower GPUs (default: 1)")
    # For the processes that this tool starts itself.
    add("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    add("--rows", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.part:
        # A part is one process, whatever Slurm's environment describes, unless torchrun started it (collectives).
        alone = "TORCHELASTIC_RUN_ID" not in os.environ
        run = setup(options.device, alone=alone, deterministic=options.part == "deterministic")
        return run_rows(PARTS[options.part], Check(run, options.tiny), options.rows)
    # A GPU that torch cannot use is an error, which names the versions; no GPU at all is not.
    device = pick_device(options.device)
    if device.type == "cpu" and not options.tiny:
        if options.device == "cpu":
            raise UserError("--device cpu goes with --tiny: the recipes' own sizes would take a CPU days")
        print(
            "There is no GPU on this machine: nothing to check. --device cpu --tiny runs every part with small models."
        )
        return DONE

    if device.type == "cuda":
        require_kernels(device)
    results = open_results(options.out / "gpu_check.json", device, options)
    for name in options.only:
        done = results["parts"].get(name, {})
        if done.get("status") == DONE_STATUS:
            print(f"{name}: finished before ({len(done['rows'])} rows); --fresh runs it again", flush=True)
            continue
        print(f"{name}: at most {PARTS[name].limit * options.time_factor:.0f} s", flush=True)
        command = [sys.executable, str(Path(__file__).resolve()), "--device", device.type, "--part", name]
        command += ["--tiny"] if options.tiny else []
        outcome = run_process(command, PARTS[name].limit * options.time_factor)
        results["parts"][name] = outcome
        # After every part: an interrupted check is resumed, and has its table.
        write_text(options.out / "gpu_check.json", json.dumps(results, indent=1))
        write_text(options.out / "gpu_check.md", as_markdown(results))
        print("\n".join([*part_lines(name, outcome), ""]), flush=True)
    failed = [name for name, each in results["parts"].items() if has_failed(each)]
    print(f"{options.out}/gpu_check.md: {', '.join(failed) + ' failed' if failed else 'nothing failed'}")
    return BROKEN if failed else DONE


def has_failed(outcome: Mapping[str, Any]) -> bool:
    """Whether a part did not finish, or one of its rows failed."""
    return outcome["status"] != DONE_STATUS or any("failed" in row for row in outcome["rows"])


def open_results(path: Path, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """The results so far, without what is to be run again. Raises :class:`UserError` if they are of other hardware."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    here = {"device": name, "count": count, "torch": torch.__version__, "tiny": options.tiny}
    options.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = here | {"code": source_hash(), "parts": {}}
    if not path.exists():
        return results
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        parts, recorded = earlier["parts"], {key: earlier[key] for key in here}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is not a result of this tool ({error}); choose another --out") from error
    if recorded != here and not options.fresh:
        raise UserError(f"{path}: is of {recorded}, this is {here}; choose another --out, or start anew with --fresh")
    again = options.only if options.fresh else ()
    # Results of other hardware are dropped: a table is of one machine.
    results["parts"] = {key: each for key, each in parts.items() if key not in again and recorded == here}
    return results


# --------------------------------------------------------------------------------------------------
# A part, in a process of its own
# --------------------------------------------------------------------------------------------------


def run_rows(part: Part, check: Check, path: Path) -> int:
    """Run a part within this process; every row is in the file ``path`` as soon as it is measured."""
    for row in part.run(check):
        # With several processes, as in collectives, only the first one writes.
        if check.run.is_main:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    check.run.close()
    return DONE


def run_process(command: Sequence[str], limit: float) -> dict[str, Any]:
    """Run ``command --rows FILE`` for at most ``limit`` seconds: its status, its seconds, and the rows it wrote."""
    with tempfile.TemporaryDirectory() as name:
        rows, log = Path(name) / "rows.jsonl", Path(name) / "log"
        rows.touch()
        start = time.monotonic()
        with log.open("w") as output:
            # As Ctrl-C: a scheduler's signal must not leave the part behind, alone on the GPU.
            before = signal.signal(signal.SIGTERM, signal.default_int_handler)
            # A session of its own: at the end the loaders' workers and torchrun's processes end with it.
            process = subprocess.Popen(
                [*command, "--rows", str(rows)], stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code = process.wait(limit)
                status = DONE_STATUS if code == 0 else f"ended with exit code {code}"
                if code < 0:
                    status = f"ended by {signal.Signals(-code).name}"
            except subprocess.TimeoutExpired:
                status = f"stopped after {limit:.0f} s"
            finally:
                end_session(process)
                signal.signal(signal.SIGTERM, before)
        # The last line is unfinished where the process was killed while it wrote.
        lines = [line for line in rows.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
        outcome = {"status": status, "seconds": time.monotonic() - start, "rows": [json.loads(each) for each in lines]}
        if has_failed(outcome):
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-LINES_SHOWN:]
            outcome["log"] = last
        return outcome


def end_session(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a session, and all that it started."""
    # First a request: torchrun's processes have sessions of their own and end only with torchrun's help.
    for request in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, request)
        end = time.monotonic() + GRACE
        while time.monotonic() < end:
            process.poll()  # or the process itself, as a zombie, would count as alive
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.1)


# --------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------


def as_markdown(results: Mapping[str, Any]) -> str:
    """The results as a page."""
    # A table means nothing without the device that it was measured on.
    lines = [f"# GPU check: {results['count']} x {results['device']}", ""]
    lines += [f"torch {results['torch']}, code {results['code']}{', tiny models' if results['tiny'] else ''}", ""]
    for name, outcome in results["parts"].items():
        lines += part_lines(name, outcome)
    return "\n".join(lines)


def part_lines(name: str, outcome: Mapping[str, Any]) -> list[str]:
    """A part as a section: what it is, its table, and how it ended."""
    about = (PARTS[name].run.__doc__ or "").splitlines()[0]
    lines = [f"## {name} ({outcome['seconds']:.0f} s)", "", about, ""]
    # Rows that were left out lack the columns of the others; reasons come last.
    columns = list(dict.fromkeys(key for row in outcome["rows"] for key in row))
    columns.sort(key=lambda key: key in ("left out", "failed"))
    if columns:
        rows = ([cell(row.get(key)) for key in columns] for row in outcome["rows"])
        lines += [*markdown_table(columns, rows), ""]
    if outcome["status"] != DONE_STATUS:
        lines += [f"**This part {outcome['status']}; its rows above are complete.**", ""]
        lines += ["```", *outcome["log"], "```", ""]
    return lines


def cell(value: Any) -> str:
    """A value in a table."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        # Three digits of small numbers, whole numbers of large ones.
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return str(value).replace("|", "/")


if __name__ == "__main__":
    run_tool(main)
