"""Hand-object narrations from anyone's egocentric videos: detect, track, narrate, check.

Your narrations: python tools/generate_hod.py --metadata narrations.csv --root videos --output hod.csv
The demo world:  python tools/generate_hod.py --config_file configs/hod/demo.yml
Look first:      ... --dry_run          what there is to do, a few clips tried, how long it takes
One stage:       ... --stage detect     then track, narrate and check, when and where you like
Many machines:   ... --shard 3/64       a part of the clips; 0/64 is the first
                 ... --submit 64        all of them as a Slurm array, and a job that merges
                 ... --merge            put the finished parts together
What failed:     ... --retry            try those clips again

--metadata is any file of narrations that main_pretrain.py reads, or EPIC-KITCHENS-100's csv; without one, windows over
the videos of --root are narrated (narrator.kind=vlm). What a stage finds out about a clip is kept in OUTPUT.work: the
same command goes on where it was interrupted, and with other settings does again only what they change. OUTPUT is what
main_pretrain.py trains on; OUTPUT.failures.csv lists the clips without a narration, with the reason.

Exit code 0: done; 2: something that the last line names and you can mend; 130: interrupted.
"""

from __future__ import annotations

import argparse
import logging
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from _common import run_tool

from egohod import cli
from egohod.config import to_yaml
from egohod.demo import make_world
from egohod.errors import UserError
from egohod.hod import config
from egohod.hod.config import HodConfig
from egohod.hod.pipeline import STAGES, Plan, Progress, build
from egohod.hod.store import Shard, written

log = logging.getLogger("generate_hod")

SAY_EVERY = 5.0
# Clips that a dry run tries.
TRIED = 3


def main(arguments: Sequence[str]) -> int:
    signal.signal(signal.SIGTERM, _interrupt)
    args = _parse(arguments)
    shard = Shard.parse(args.shard) if args.shard else Shard()
    cfg = config.load(args.config_file, _overrides(args))
    if args.which_detector:
        print(cfg.detector.kind)
        return cli.DONE
    _render(cfg, args.dry_run)
    plan = build(cfg, again=args.retry, tell=Teller())
    if args.dry_run:
        return _dry_run(cfg, plan, shard)
    if args.submit is not None:
        return _submit(cfg, plan, args)
    if args.merge:
        return _merge(plan, args.shard and shard.of)
    with plan.work.claim(shard):
        summary = plan.finished(shard)
        if summary and not (args.retry and (summary["failures"] or summary["makeshift"])):
            log.info("shard %s is finished: %s narrations; nothing to do", shard, f"{summary['narrations']:,}")
            if summary["failures"]:
                log.warning("%s clips failed; --retry tries them again", f"{summary['failures']:,}")
        else:
            with written(plan.work.folder / "config.yml") as file:
                file.write(to_yaml(cfg))
            for stage in STAGES if args.stage == "all" else [args.stage]:
                _say(plan.pipeline.run(stage, shard))
            if args.stage not in ("all", STAGES[-1]):
                return cli.DONE
            result = plan.finish(shard)
            log.info("shard %s: %s narrations", shard, f"{result.narrations:,}")
        if shard.of > 1:
            log.info("when all %d shards are finished, --merge puts them together", shard.of)
            return cli.DONE
        return _merge(plan, 1)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = cli.parser(__doc__ or "", "configs/hod/default.yml", HodConfig)
    add = parser.add_argument
    add("--metadata", metavar="FILE", help="narrations (source.metadata)")
    add("--root", metavar="FOLDER", help="videos, a folder or s3://... (source.root)")
    add("--output", metavar="CSV", help="hand-object narrations (output)")
    add("--stage", default="all", choices=("all", *STAGES), help="run one stage only (default: all)")
    add("--shard", metavar="I/N", help="only part I of N, counted from 0")
    add("--merge", action="store_true", help="put the parts of finished shards together")
    add("--retry", action="store_true", help="try the clips again that failed, or that a model left unanswered")
    add("--submit", type=int, metavar="N", help="submit N shards and a merge to Slurm, and leave")
    add("--which_detector", action="store_true", help="only say which one the configuration chooses")
    add("--dry_run", action="store_true", help="say what there is to do, try a few clips, and write nothing")
    return parser.parse_intermixed_args(arguments)


def _overrides(args: argparse.Namespace) -> list[str]:
    named = {"source.metadata": args.metadata, "source.root": args.root, "output": args.output}
    return [*(f"{name}={value}" for name, value in named.items() if value is not None), *args.overrides]


def _render(cfg: HodConfig, dry: bool) -> None:
    """Make the demo world if the configuration is about it and it is not there."""
    if not cfg.demo.folder:
        return
    folder = Path(cfg.demo.folder)
    if dry and not (folder / "train" / "hod.csv").exists():
        raise UserError(f"{folder}: the demo world is not there yet; without --dry_run it is rendered first")
    if not dry and make_world(folder, scale=cfg.demo.scale):
        log.info("%s: rendered the demo world", folder)


def _merge(plan: Plan, shards: int | None) -> int:
    known = plan.work.divisions(plan.fingerprint)
    if shards is None and len(known) != 1:
        there = f"shards of divisions by {', '.join(map(str, known))}" if known else "no shard"
        raise UserError(
            f"{plan.work.folder}: holds {there} that is finished with these settings; --shard 0/N says which N is meant"
        )
    total = plan.merge(shards or known[0])
    log.info("%s: %s narrations", plan.work.output, f"{total['narrations']:,}")
    if total["failures"]:
        log.warning(
            "%s clips have none, %s says why; --retry tries them again", f"{total['failures']:,}", plan.work.failures
        )
    return cli.DONE


def _dry_run(cfg: HodConfig, plan: Plan, shard: Shard) -> int:
    """Writes nothing."""
    pipeline, clips = plan.pipeline, plan.pipeline.clips(shard)
    log.info("shard %s: %s of %s clips", shard, f"{len(clips):,}", f"{len(pipeline.table):,}")
    known = pipeline.count_known(shard)
    for stage in STAGES:
        log.info("  %-8s %s to do", stage, f"{len(clips) - known[stage]:,}")
    spent: dict[str, list[float]] = {stage: [] for stage in STAGES}
    for index in clips[:: max(1, len(clips) // TRIED)][:TRIED]:
        log.info("%s: %s", pipeline.table.where(index), " / ".join(pipeline.table.row(index).texts))
        for stage, found, seconds in pipeline.try_out(index):
            spent[stage].append(seconds)
            if found.fault:
                log.warning("  %s: %s", stage, found.fault)
        if not found.fault:
            log.info("  -> %s", found.value["text"])
    left = sum(_usual(spent[stage]) * (len(clips) - known[stage]) for stage in STAGES)
    log.info("about %s with one process; would write %s", _clock(left), plan.work.output)
    return cli.DONE


def _usual(spent: Sequence[float]) -> float:
    """Seconds a clip. The first one waits for models to load too, which no other does."""
    return statistics.mean(spent[1:] or spent or [0.0])


def _submit(cfg: HodConfig, plan: Plan, args: argparse.Namespace) -> int:
    """A Slurm array of shards, and a job that merges them."""
    if args.submit < 1:
        raise UserError(f"--submit must be at least 1, not {args.submit}")
    import submitit
    from submitit.core.utils import FailedJobError
    from submitit.helpers import CommandFunction

    try:
        executor = submitit.AutoExecutor(folder=plan.work.folder / "slurm", cluster="slurm")
    except RuntimeError as error:
        raise UserError(f"--submit: there is no Slurm here: {error}") from error
    executor.update_parameters(name="generate_hod", cpus_per_task=max(1, cfg.workers), **_slurm(cfg))
    settings = plan.work.folder / "slurm" / "config.yml"
    with written(settings) as file:
        file.write(to_yaml(cfg))
    command = [sys.executable, str(Path(__file__).resolve()), "--config_file", str(settings.resolve())]
    asked = ["--stage", args.stage, *(["--retry"] if args.retry else [])]
    shards = [str(Shard(number, args.submit)) for number in range(args.submit)]
    try:
        jobs = executor.map_array(lambda shard: CommandFunction([*command, *asked, "--shard", shard])(), shards)
        array = jobs[0].job_id.partition("_")[0]
        log.info("submitted %d shards as job %s", args.submit, array)
        if args.stage in ("all", STAGES[-1]):
            executor.update_parameters(cpus_per_task=1, slurm_additional_parameters={"dependency": f"afterok:{array}"})
            last = executor.submit(CommandFunction([*command, "--merge", "--shard", shards[0]]))
            log.info("submitted the merge as job %s", last.job_id)
    except FailedJobError as error:
        raise UserError(f"--submit: Slurm does not take the jobs: {' '.join(str(error).split())}") from error
    return cli.DONE


def _slurm(cfg: HodConfig) -> dict[str, object]:
    asked = {
        "timeout_min": cfg.slurm.minutes,
        "slurm_partition": cfg.slurm.partition,
        "slurm_array_parallelism": cfg.slurm.at_once,
        "mem_gb": cfg.slurm.memory_gb,
        "gpus_per_node": cfg.slurm.gpus,
    }
    return {name: value for name, value in asked.items() if value}


class Teller:
    """A line every few seconds, with the time left."""

    def __init__(self) -> None:
        self._stage, self._began, self._said, self._first = "", 0.0, 0.0, 0

    def __call__(self, at: Progress) -> None:
        """Say how far a stage is, if it is time to."""
        now = time.monotonic()
        if at.stage != self._stage:
            self._stage, self._said, self._first = at.stage, now, 0
        if not self._first:
            # Models load before the first clip is done, and never again.
            self._began, self._first = now, at.done
        if now - self._said < SAY_EVERY:
            return
        self._said = now
        speed = (at.done - self._first) / max(now - self._began, 1e-9)
        ready = at.known + at.done + at.lacking + at.unready
        log.info(
            "%-7s %3.0f %%  %s of %s clips, %.1f clips/s, ETA %s%s",
            at.stage, 100 * ready / max(1, at.total), f"{ready:,}", f"{at.total:,}", speed,
            _clock((at.total - ready) / speed) if speed else "unknown",
            f", {at.failed:,} failed" if at.failed else "",
        )  # fmt: skip


def _say(at: Progress) -> None:
    notes = [
        (at.known, "known already"),
        (at.failed, "failed"),
        (at.failed_before, "failed before and are left alone without --retry"),
        (at.lacking, "failed at a stage before"),
    ]
    said = "".join(f", {count:,} {what}" for count, what in notes if count)
    log.info("%-7s done: %s clips now%s", at.stage, f"{at.done:,}", said)
    if at.unready:
        log.warning(
            "%s: %s clips have not been through the stages before; run those first", at.stage, f"{at.unready:,}"
        )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    run_tool(main)
