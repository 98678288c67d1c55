"""Open every clip that a configuration's sources name; report what cannot be read, and write exclude lists.

    python tools/verify_dataset.py --config_file configs/demo.yml
    python tools/verify_dataset.py --config_file my.yml --dry_run      # how long it would take
    python main_pretrain.py --config_file my.yml data.train.own.exclude=verified/own_exclude.csv

For each source NAME of data.train the output folder gets NAME_exclude.csv (a row for each clip that cannot be read,
with the reason), and report.json counts the reasons. An interrupted run goes on where it stopped. Exit code 0: every
clip can be read; 1: some cannot; 2: something in the configuration or the tables that the message names.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from _common import run_tool

from egohod import cli, config
from egohod.data.verify import Verdict, Verifier
from egohod.errors import UserError
from egohod.runtime import usable_cores
from egohod.training.setup import active_sources, build_dataset

log = logging.getLogger("verify_dataset")


class Progress:
    """A line every two seconds, with the time left."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._begin = self._said = time.monotonic()
        self._first: int | None = None

    def __call__(self, done: int, total: int, faults: int) -> None:
        """Say how far a source is, if it is time to."""
        now = time.monotonic()
        self._first = done if self._first is None else self._first
        if done == total or now - self._said > 2:
            rate = (done - self._first) / max(now - self._begin, 1e-9)
            left = timedelta(seconds=round((total - done) / max(rate, 1e-9))) if rate or done == total else "unknown"
            log.info(
                "%s: %s of %s clips, %s unreadable, ETA %s", self._name, f"{done:,}", f"{total:,}", f"{faults:,}", left
            )
            self._said = now


def main(arguments: Sequence[str]) -> int:
    parser = cli.parser(__doc__ or "", "configs/demo.yml")
    parser.add_argument("--output", type=Path, default=Path("verified"), help="folder of the lists (default: verified)")
    cores = usable_cores()
    parser.add_argument("--workers", type=int, default=cores, help="processes (default: one per core)")
    parser.add_argument("--frames", type=int, default=4, help="frames read of each clip (default: 4)")
    parser.add_argument("--strict", action="store_true", help="stop at the first clip or row that cannot be used")
    parser.add_argument("--dry_run", action="store_true", help="say how much there is to do, and write nothing")
    args = parser.parse_intermixed_args(arguments)
    if args.workers < 1 or args.frames < 1:
        raise UserError("--workers and --frames count from 1")
    cfg = config.load(args.config_file, cli.overrides(args))
    dataset = build_dataset(cfg, size=1)
    verifiers = [
        Verifier(name, source, args.output, args.frames)
        for name, source in zip(active_sources(cfg), dataset.sources, strict=True)
    ]
    if args.dry_run:
        for verifier in verifiers:
            table = verifier.source.table
            videos = len(set(table.group_codes(["video"]).tolist()))
            hours = verifier.estimate() / max(1, args.workers) / 3600
            log.info(
                "%s: %s clips of %s videos, about %s (%.3g hours)",
                verifier.name, f"{len(table):,}", f"{videos:,}", timedelta(seconds=round(3600 * hours)), hours,
            )  # fmt: skip
        return cli.DONE
    args.output.mkdir(parents=True, exist_ok=True)
    verdicts: dict[str, Verdict] = {}
    for verifier in verifiers:
        verdicts[verifier.name] = verifier.run(args.workers, Progress(verifier.name), args.strict)
    report = {
        name: {"clips": verdict.clips, "unreadable": len(verdict.faults), "reasons": verdict.reasons}
        for name, verdict in verdicts.items()
    }
    (args.output / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for verifier in verifiers:
        _say(verifier, verdicts[verifier.name])
    return cli.BROKEN if any(verdict.faults for verdict in verdicts.values()) else cli.DONE


def _say(verifier: Verifier, verdict: Verdict) -> None:
    log.info("%s: %d clips, %d unreadable", verifier.name, verdict.clips, len(verdict.faults))
    for reason, count in verdict.reasons.items():
        log.info("    %6d  %s", count, reason)
    if verdict.faults:
        log.info("    leave them out with data.train.%s.exclude=%s", verifier.name, verifier.exclude)


if __name__ == "__main__":
    run_tool(main)
