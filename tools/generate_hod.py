"""Generate hand-object narrations from egocentric videos: detect, track, narrate, check.

Your narrations: python tools/generate_hod.py --metadata narrations.csv --root videos --output hod.csv
The demo world:  python tools/generate_hod.py --config_file configs/hod/demo.yml
The detector:    ... detector.kind=doh100 detector.options.weights=FILE     default mediapipe; docs/hod.md lists all
A model:         ... narrator.kind=llm narrator.endpoint=http://127.0.0.1:8000/v1     default template, which needs none
Dry run:         ... --dry_run          print what is left to do, try a few clips, estimate the time
One stage:       ... --stage detect     then track, narrate and check, each on a machine of your choice
Shards:          ... --shard 3/64       one part of the clips; 0/64 is the first
                 ... --submit 64        all parts as a Slurm array, and a job that merges them
                 ... --merge            merge the finished parts
Failed clips:    ... --retry            try them again
Batches:         ... --batch_requests requests.jsonl       write a language model's requests, for vllm run-batch
                 ... --batch_answers answers.jsonl         read its answers
The boxes:       ... --export_detections boxes.parquet     for training (data.train.NAME.detections) or another run
Look at it:      python tools/visualize_hod.py --metadata narrations.csv --root videos --output hod.csv --page hod.html

Step by step, from a folder of videos to a trained model: docs/narrate.md.

--metadata is any file of narrations that main_pretrain.py reads, or EPIC-KITCHENS-100's csv; without one, windows over
the videos of --root are narrated (narrator.kind=vlm). The results of each stage are stored in OUTPUT.work: rerun the
command to resume after an interruption; after a change of settings only the stages that depend on it are recomputed.
main_pretrain.py trains on OUTPUT; OUTPUT.failures.csv lists the clips without a narration, each with the reason.

Exit code: 0 done; 2 an error in the input or the settings, which the last line explains; 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from _common import run_tool

from egohod import cli
from egohod.config import to_yaml
from egohod.demo import make_world
from egohod.errors import UserError
from egohod.hod import config
from egohod.hod import pipeline as hod_pipeline
from egohod.hod.config import FURTHER_CAPTIONS, HodConfig
from egohod.hod.detectors import typed_options
from egohod.hod.narrators import Cost
from egohod.hod.pipeline import CHECK, NARRATE, Pipeline, Task, build
from egohod.hod.store import Shard, text_file
from egohod.runtime import STOP_SIGNALS, time_left

log = logging.getLogger("generate_hod")

# Clips that a dry run tries.
TRIED = 3


def main(arguments: Sequence[str]) -> int:
    # Schedulers and containers end a job by signals: as after Ctrl-C the workers are ended and the files closed.
    for each in STOP_SIGNALS:
        signal.signal(each, signal.default_int_handler)
    args = _parse(arguments)
    shard = Shard.parse(args.shard) if args.shard else Shard()
    named = {"source.metadata": args.metadata, "source.root": args.root, "output": args.output}
    overrides = [f"{name}={value}" for name, value in named.items() if value is not None]
    cfg = config.load(args.config_file, [*overrides, *args.overrides])
    if args.which_detector:
        print(cfg.detector.kind)
        return cli.DONE
    # First of all: rendering a world and reading metadata take minutes.
    cfg.detector.options = typed_options(cfg.detector.kind, cfg.detector.options)
    if cfg.demo.folder:
        folder = Path(cfg.demo.folder)
        if args.dry_run and not (folder / "train" / "hod.csv").exists():
            raise UserError(f"{folder}: there is no demo world yet; without --dry_run it is rendered first")
        if not args.dry_run and make_world(folder, scale=cfg.demo.scale):
            log.info("%s: rendered the demo world", folder)
    if args.dry_run:
        cfg.workers = 0  # its clips come one by one, and each would start workers that load the detector anew
    pipeline = build(cfg, retry=args.retry, save=not args.dry_run)
    if args.batch_requests or args.batch_answers:
        return _batch(pipeline, shard, args)
    if args.dry_run:
        return _dry_run(pipeline, shard)
    if args.submit is not None:
        return _submit(pipeline, args)
    if args.export_detections:
        count = pipeline.export_detections(args.export_detections)
        log.info("%s: %s boxes", args.export_detections, f"{count:,}")
        return cli.DONE
    if args.merge:
        return _merge(pipeline, shard.count if args.shard else None)
    with pipeline.store.claim(shard):
        finished = pipeline.finished(shard)
        if finished and not (args.retry and (finished.failures or finished.fallbacks)):
            log.info("shard %s is finished: %s narrations; nothing to do", shard, f"{finished.narrations:,}")
            if finished.failures:
                log.warning("%s clips failed; --retry tries them again", f"{finished.failures:,}")
        else:
            _write_settings(pipeline)
            if args.stage == "all":
                pipeline.run_all(shard)
            else:
                pipeline.run([args.stage], shard)
            if args.stage not in ("all", pipeline.stages[-1].name):
                return cli.DONE  # a shard is finished when its last stage is
            log.info("shard %s: %s narrations", shard, f"{pipeline.finish(shard).narrations:,}")
        return _merge_if_whole(pipeline, shard)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = cli.parser(__doc__ or "", "configs/hod/default.yml", HodConfig)
    add, stages = parser.add_argument, [stage.name for stage in hod_pipeline.STAGES]
    add("--metadata", metavar="FILE", help="narrations (source.metadata)")
    add("--root", metavar="FOLDER", help="videos, a folder or s3://... (source.root)")
    add("--output", metavar="CSV", help="hand-object narrations (output)")
    add("--stage", default="all", choices=("all", *stages), help="run one stage only (default: all)")
    add("--shard", metavar="I/N", help="only part I of N, counted from 0")
    add("--merge", action="store_true", help="merge the finished shards into OUTPUT")
    add("--export_detections", type=Path, metavar="PARQUET", help="write the boxes detected so far to a file, and exit")
    add("--batch_requests", type=Path, metavar="JSONL", help="write the requests to the language model to a file")
    add("--batch_answers", type=Path, action="append", metavar="JSONL", help="read its answers; once for each file")
    add("--retry", action="store_true", help="try failed clips again, and those without an answer from the model")
    add("--submit", type=int, metavar="N", help="submit N shards and a merge to Slurm, and exit")
    add("--which_detector", action="store_true", help="print the configured detector, and exit")
    add("--dry_run", action="store_true", help="print what is left to do, try a few clips, write nothing")
    return parser.parse_intermixed_args(arguments)


def _write_settings(pipeline: Pipeline) -> None:
    # For people: what is computed again depends on the hashes in the results alone.
    with text_file(pipeline.store.folder / "config.yml") as file:
        file.write(to_yaml(pipeline.cfg))


def _batch(pipeline: Pipeline, shard: Shard, args: argparse.Namespace) -> int:
    """The narrate stage by files: its requests, or its answers and what follows."""
    others = ["dry_run", "submit", "export_detections", "merge"]
    clash = [f"--{name}" for name in others if getattr(args, name) not in (None, False)]
    clash += ["--stage"] if args.stage != "all" else []
    clash += ["--batch_answers"] if args.batch_requests and args.batch_answers else []
    if clash:
        used = "--batch_requests" if args.batch_requests else "--batch_answers"
        raise UserError(f"{used} does all that it needs; without {clash[0]}")
    with pipeline.store.claim(shard):
        _write_settings(pipeline)
        if args.batch_answers:
            pipeline.read_answers(shard, args.batch_answers)
            finished = pipeline.finish(shard)
            if finished.fallbacks:
                log.warning(
                    "%s captions are the template's: their request failed, or the model's caption was refused; --retry "
                    "--batch_requests FILE requests them again, refused ones with the reasons",
                    f"{finished.fallbacks:,}",
                )
            return _merge_if_whole(pipeline, shard)
        count = pipeline.write_requests(shard, args.batch_requests)
        if count:
            log.info("%s: %s requests; --batch_answers FILE reads the answers", args.batch_requests, f"{count:,}")
        else:
            log.info("no request is due, and none is written")
    return cli.DONE


def _merge_if_whole(pipeline: Pipeline, shard: Shard) -> int:
    if shard.count == 1:
        return _merge(pipeline, 1)
    log.info("when all %d shards are finished, --merge puts them together", shard.count)
    return cli.DONE


def _merge(pipeline: Pipeline, shards: int | None) -> int:
    store = pipeline.store
    if shards is None:  # --merge alone: the folder tells how many shards there are, if it is clear
        counts = store.divisions(pipeline.fingerprint)
        if len(counts) != 1:
            what = f"shards of divisions by {', '.join(map(str, counts))}" if counts else "no shard"
            raise UserError(
                f"{store.folder}: holds {what} that is finished with these settings; --shard 0/N chooses N shards"
            )
        shards = counts[0]
    total = pipeline.merge(shards)
    log.info("%s: %s narrations", store.output, f"{total.narrations:,}")
    if total.failures:
        log.warning(
            "%s clips have none, for the reasons in %s; --retry tries them again", f"{total.failures:,}", store.failures
        )
    return cli.DONE


def _dry_run(pipeline: Pipeline, shard: Shard) -> int:
    clips, table, names = pipeline.clips(shard), pipeline.table, [stage.name for stage in pipeline.stages]
    log.info("shard %s: %s of %s clips", shard, f"{len(clips):,}", f"{len(table):,}")
    to_do = dict.fromkeys(names, len(clips))
    with pipeline.store.results(shard) as results:
        for index in clips:  # one after the other: the results of a million clips are gigabytes
            for stage in pipeline.stored(index, results):
                to_do[stage] -= 1
    for stage, count in to_do.items():
        log.info("  %-8s %s to do", stage, f"{count:,}")
    seconds: dict[str, list[float]] = {stage: [] for stage in names}
    # Spread over the shard: neighbouring clips are of one video, which may be the odd one.
    tasks = [Task(index) for index in clips[:: max(1, len(clips) // TRIED)][:TRIED]]
    for task in tasks:
        log.info("%s: %s", table.where(task.index), " / ".join(table.row(task.index).texts))
        for stage, outcome, spent in pipeline.try_clip(task):
            seconds[stage].append(spent)
            if outcome.fault:
                log.warning("  %s: %s", stage, outcome.fault)
        if not outcome.fault:
            log.info("  -> %s", outcome.value["text"])
            for name in FURTHER_CAPTIONS:
                if outcome.value[name]:
                    log.info("  %s: %s", name, outcome.value[name])
    # The first clip waits for models to load, which no other does.
    each = {stage: statistics.mean(spent[1:] or spent or [0.0]) for stage, spent in seconds.items()}
    total = _estimate(pipeline, pipeline.measured_cost(tasks), each, to_do)
    log.info("about %s with one process; would write %s", time_left(total, 1.0), pipeline.store.output)
    return cli.DONE


def _estimate(pipeline: Pipeline, cost: Cost | None, each: Mapping[str, float], to_do: Mapping[str, int]) -> float:
    """Log time and cost of 1,000 clips and of what is to do, as a table and as a line of JSON; seconds of the latter.

    ``each`` are the seconds of a clip at each stage, ``cost`` those of its requests where a model narrates.
    """
    settings = pipeline.cfg.narrator
    # The time of a model is that of its requests, of which several are in flight.
    local = [stage for stage in each if cost is None or stage not in (NARRATE, CHECK)]
    columns = []
    for counts in (dict.fromkeys(each, 1000), to_do):
        clips = counts[NARRATE]
        values: dict[str, float | None] = {"clips": clips, "local_seconds": sum(each[x] * counts[x] for x in local)}
        if cost is not None:
            values |= {
                name: None if value is None else value * clips
                for name, value in vars(cost).items()
                if name != "price" or value is not None
            }
        columns.append({name: value and round(value, 3) for name, value in values.items()})
    titles = {
        "clips": "estimate: clips",
        "local_seconds": f"{', '.join(local)}, one process",
        "requests": f"requests of {settings.batch} clips",
        "seconds": f"their time, {settings.concurrency} at once",
        "prompt_tokens": "tokens of prompts",
        "completion_tokens": "tokens of answers",
        "price": "price",
    }
    for name in columns[0]:
        cells = []
        for value in (column[name] for column in columns):
            number = "not counted" if value is None else f"{value:,.{2 if name == 'price' else 0}f}"
            cells.append(time_left(value or 0.0, 1.0) if name.endswith("seconds") else number)
        log.info("%-40s %14s %14s", titles[name], *cells)
    log.info("estimate %s", json.dumps({"per_1000_clips": columns[0], "to_do": columns[1]}))
    return (columns[1]["local_seconds"] or 0.0) + (columns[1].get("seconds") or 0.0)


def _submit(pipeline: Pipeline, args: argparse.Namespace) -> int:
    """A Slurm array of shards, and a job that merges them."""
    if args.submit < 1:
        raise UserError(f"--submit must be at least 1, not {args.submit}")
    import submitit  # of no use without Slurm
    from submitit.core.utils import FailedJobError
    from submitit.helpers import CommandFunction

    cfg, folder = pipeline.cfg, pipeline.store.folder / "slurm"
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster="slurm")
    except RuntimeError as error:
        raise UserError(f"--submit: there is no Slurm here: {error}") from error
    requested = {
        "timeout_min": cfg.slurm.minutes,
        "slurm_partition": cfg.slurm.partition,
        "slurm_array_parallelism": cfg.slurm.at_once,
        "mem_gb": cfg.slurm.memory_gb,
        "gpus_per_node": cfg.slurm.gpus,
    }
    requested = {name: value for name, value in requested.items() if value}
    # The main process hardly computes: it hands clips to the workers and stores what they make.
    executor.update_parameters(name="generate_hod", cpus_per_task=max(1, cfg.workers), **requested)
    # The jobs read the settings of this moment, whatever happens to the files and variables they came from.
    with text_file(folder / "config.yml") as file:
        file.write(to_yaml(cfg))
    command = [sys.executable, str(Path(__file__).resolve()), "--config_file", str((folder / "config.yml").resolve())]
    options = ["--stage", args.stage, *(["--retry"] if args.retry else [])]
    shards = [str(shard) for shard in Shard.all(args.submit)]
    # A plain command, not a pickled function: a job starts as from a shell, with the code of that moment.
    try:
        jobs = executor.map_array(lambda shard: CommandFunction([*command, *options, "--shard", shard])(), shards)
        array = jobs[0].job_id.partition("_")[0]
        log.info("submitted %d shards as job %s", args.submit, array)
        if args.stage in ("all", pipeline.stages[-1].name):
            # afterok: without all shards a merge would only refuse. --shard names the division, of which there may be
            # several in the folder.
            executor.update_parameters(cpus_per_task=1, slurm_additional_parameters={"dependency": f"afterok:{array}"})
            last = executor.submit(CommandFunction([*command, "--merge", "--shard", shards[0]]))
            log.info("submitted the merge as job %s", last.job_id)
    except FailedJobError as error:
        raise UserError(f"--submit: Slurm does not take the jobs: {' '.join(str(error).split())}") from error
    return cli.DONE


if __name__ == "__main__":
    run_tool(main)
