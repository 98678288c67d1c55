"""Submit a training run through submitit: to a Slurm cluster, requeued until it is done, or on this machine.

    python tools/submit.py configs/config/clip_base.yml --nodes 2 --gpus 8 --cpus 12 --partition NAME --time 4h
    python tools/submit.py configs/own.yml train.lr=1e-4 train.output=runs/mine --nodes 4 --gpus 8 --time 1d
    python tools/submit.py configs/finetune/ek100_mir.yml --program finetune --gpus 4 --time 8h
    python tools/submit.py configs/demo.yml --cluster local --processes 2            on this machine, to try it
    python tools/submit.py configs/config/clip_base.yml --nodes 2 --gpus 8 --dry_run      the sbatch file
    python tools/submit.py --status runs/clip_base                                        state, step, time left

--signal_before seconds before the time limit, or when it is preempted, a job saves after the current step, returns to
the queue and resumes from there; it ends when the training run does. Its logs are in RUN/submitted. The configuration
is checked before anything is submitted.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from _common import run_tool, tool_parser

from egohod import cli, config
from egohod.errors import UserError

FOLDER = "submitted"
# A copy: a task unpickles Training before this project can be imported, so that it must not refer to egohod.
UNFINISHED = cli.UNFINISHED
UNITS = {"m": 1, "h": 60, "d": 24 * 60}
# What feeds a GPU from original videos with ViT-B/16 (docs/scaling.md), and upstream's number.
GPU_WORKERS = 8
FEWEST_CORES = 4
# squeue loads the scheduler, which clusters ask users to spare.
STATUS_SECONDS = 10


class Training:
    """One process of a training run, as submitit runs it in every task."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.command, self.environment = list(command), dict(environment)
        self.folder = Path.cwd()
        self._child: subprocess.Popen[bytes] | None = None
        self._codes: list[int] = []

    def __call__(self) -> int:
        """Run the program to its end. Raises RuntimeError if it fails."""
        with tempfile.TemporaryDirectory() as folder:
            unfinished = Path(folder) / "unfinished"
            ours = self.environment | {UNFINISHED: str(unfinished)}
            if "SUBMITIT_LOCAL_NTASKS" in os.environ:
                # The variables that torchrun would set: without Slurm this tool is the launcher.
                names = {"RANK": "GLOBALID", "LOCAL_RANK": "LOCALID", "WORLD_SIZE": "NTASKS"}
                ours |= {name: os.environ[f"SUBMITIT_LOCAL_{theirs}"] for name, theirs in names.items()}
            # Slurm signals all processes of a job; the program ignores that one, and checkpoint() stops it instead.
            self._child = subprocess.Popen(
                self.command,
                cwd=self.folder,
                env=os.environ | ours,
                preexec_fn=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN),
            )
            # Waited for in a thread, because a signal handler of the main one may have to wait as well.
            threading.Thread(target=lambda: self._codes.append(self._child.wait()), daemon=True).start()
            code = self._wait()
            job = os.environ.get("SLURM_JOB_ID")
            # Not a job that was cancelled, which Slurm would requeue as well.
            if code == 0 and unfinished.exists() and (job is None or _queue(job)[:1] == ["RUNNING"]):
                # A preemption that came as SIGTERM, which submitit ignores.
                signal.raise_signal(signal.SIGUSR2)
        if code != 0:
            raise RuntimeError(f"exit code {code}")
        return code

    def checkpoint(self) -> Any:
        """Stop the program with a checkpoint; submitit calls this in the first task before it requeues the job."""
        from submitit.helpers import DelayedSubmission

        if self._child is not None:
            if not self._codes:
                self._child.send_signal(signal.SIGUSR1)
            code = self._wait()
            # A program without its handler yet dies of the signal and loses nothing; after an error there
            # is no point in trying again.
            if code not in (0, -signal.SIGUSR1):
                raise RuntimeError(f"exit code {code}")
        # A fresh one: this one holds a process, which cannot be pickled.
        again = Training(self.command, self.environment)
        again.folder = self.folder
        return DelayedSubmission(again)

    def _wait(self) -> int:
        # Polling without a lock: the signal handler may wait while the main code waits too, and a lock would deadlock.
        while not self._codes:
            time.sleep(0.1)
        return self._codes[0]


def _queue(job: str) -> list[str]:
    """Slurm's state of a job and its reason; empty for one that has left the queue. Raises :class:`UserError`."""
    # Not sacct, which needs an accounting database that small clusters do not run.
    command = ["squeue", "--noheader", "--jobs", job, "--format=%T %r"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    except FileNotFoundError as error:
        raise UserError("there is no squeue on the PATH to query Slurm with") from error


def main(arguments: Sequence[str]) -> int:
    args = _parser().parse_intermixed_args(arguments)
    if args.status:
        print(status(Path(args.status)))
        return cli.DONE
    if not args.config:
        raise UserError("which configuration? python tools/submit.py --help shows examples")
    # Loaded here only to find mistakes before a job waits in the queue for hours; and for its output folder.
    path = config.config_path(args.config)
    cfg = config.load(path, args.overrides)
    run = Path(cfg.train.output).resolve()
    # The decoding processes of the loader and the training process itself. Automatic ones take what the job gets.
    workers = cfg.data.workers if cfg.data.workers is not None else GPU_WORKERS if args.gpus else 0
    args.cpus = args.cpus or max(FEWEST_CORES, workers + 1)
    # Absolute: a job may start in another folder.
    command = [*config.program(args.program), "--config_file", str(path.resolve())]
    command += [*args.overrides, f"train.output={run}"]
    parameters = _parameters(args)
    if args.dry_run:
        print(_sbatch_file(run / FOLDER, parameters))
        print("# in every task: " + " ".join(command))
        return cli.DONE
    return _submit(run, command, parameters, args)


def _submit(run: Path, command: list[str], parameters: dict[str, Any], args: argparse.Namespace) -> int:
    import cloudpickle  # comes with submitit
    import submitit

    # For the command egohod this file is a module, which no job finds.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])

    folder, environment = run / FOLDER, {}
    # Under Slurm the program itself finds the first node's address among the job's variables.
    if args.cluster == "local":
        if args.nodes > 1:
            raise UserError("--cluster local is one node; set the number of processes with --processes")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    # submitit counts how often a job ran out of time and gives up after this many.
    requeues = {f"{args.cluster}_max_num_timeout": args.requeues}
    try:
        executor = submitit.AutoExecutor(folder, cluster=args.cluster, **requeues)
    except RuntimeError as error:
        raise UserError(f"no Slurm here ({error}); --cluster local runs on this machine") from error
    executor.update_parameters(**parameters)
    try:
        job = executor.submit(Training(command, environment))
    except (submitit.core.utils.FailedSubmissionError, submitit.core.utils.FailedJobError) as error:
        raise UserError(f"sbatch refused: {str(error).strip()}") from error
    # For --status, which may be called much later.
    (folder / "job").write_text(f"{args.cluster} {job.job_id}")
    print(f"job {job.job_id}; {job.paths.stderr} is its log")
    if args.cluster != "local" and not args.watch:
        print(f"python tools/submit.py --status {run}")
        return cli.DONE
    printed, due = "", 0.0
    while not job.done():
        time.sleep(0.5)
        if time.monotonic() > due:
            due, now = time.monotonic() + STATUS_SECONDS, status(run)
            if now != printed:
                print(now, flush=True)
            printed = now
    print(status(run))
    return cli.DONE if job.exception() is None else cli.BROKEN


def status(run: Path) -> str:
    """One line: the job, its state, and the last progress line of the run.

    Raises :class:`UserError` if ``run`` was not submitted.
    """
    folder = run / FOLDER
    try:
        cluster, job = (folder / "job").read_text().split()
    except OSError as error:
        raise UserError(f"{run}: nothing was submitted with this run folder") from error
    log = folder / f"{job}_0_log.err"
    # It may end within a character: the job is writing it.
    text = log.read_text(errors="replace") if log.exists() else ""
    # The log is the only thing that is always there; metrics.jsonl comes with the first logged step.
    steps = re.findall(r"step \d+/\d+ .*", text)
    state = _state(cluster, job, folder)
    progress = f"{steps[-1]}  ({time.time() - log.stat().st_mtime:.0f} s ago)" if steps else "no step yet"
    return f"{run}  job {job} {state}  {progress}"


def _state(cluster: str, job: str, folder: Path) -> str:
    if cluster == "slurm":
        if queued := _queue(job):
            return queued[0] if queued[-1] == "None" else f"{queued[0]} ({queued[-1]})"
    else:
        # A zombie has ended; only this process, its parent, has not collected it yet.
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(int(job)).status() != psutil.STATUS_ZOMBIE:
                return "RUNNING"
    result = folder / f"{job}_0_result.pkl"
    if not result.exists():
        return "GONE"
    # A pickled pair that begins with "success" or "error"; it is not unpickled because that could run code.
    return "FINISHED" if b"success" in result.read_bytes()[:40] else "FAILED"


def _parameters(args: argparse.Namespace) -> dict[str, Any]:
    time_limit = re.fullmatch(r"(\d+)([mhd])", args.time)
    if not time_limit:
        raise UserError(f"--time {args.time}: write 90m, 4h or 2d")
    parameters = {
        "name": args.name,
        "nodes": args.nodes,
        "tasks_per_node": args.processes or args.gpus or 1,
        "gpus_per_node": args.gpus,
        "cpus_per_task": args.cpus,
        "mem_gb": args.mem,
        "timeout_min": int(time_limit[1]) * UNITS[time_limit[2]],
        "slurm_partition": args.partition,
        "slurm_account": args.account,
        "slurm_qos": args.qos,
        "slurm_constraint": args.constraint,
        "slurm_signal_delay_s": args.signal_before,
        # A task that fails ends the others; since Slurm 22.05, srun no longer inherits cpus-per-task from sbatch.
        "slurm_srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={args.cpus}"],
        "slurm_additional_parameters": {"requeue": True},
    }
    # What is not given is left to the cluster's defaults.
    return {name: value for name, value in parameters.items() if value}


def _sbatch_file(folder: Path, parameters: dict[str, Any]) -> str:
    """What submitit would give to sbatch, also where there is none."""
    from submitit.slurm import slurm

    # submitit's own private functions: its executor makes the file only where sbatch is installed.
    its = slurm.SlurmExecutor._equivalence_dict() | {"mem_gb": "mem"}
    named = {name.removeprefix("slurm_"): value for name, value in parameters.items()}
    named = {its.get(name, name): value for name, value in named.items()}
    if "mem" in named:
        named["mem"] = slurm._convert_mem(named["mem"])
    return slurm._make_sbatch_string(f"{sys.executable} -u -m submitit.core._submit {folder}", folder, **named)


# Names are Slurm's where it has one, so that a line of an sbatch file can be copied.
def _parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("config", nargs="?", metavar="CONFIG", help="the configuration, a YAML file")
    add("overrides", nargs="*", metavar="section.key=value", help="change single knobs, e.g. train.lr=1e-4")
    add("--program", choices=("pretrain", "finetune"), default="pretrain", help="what to run (default: pretrain)")
    add("--cluster", choices=("slurm", "local"), default="slurm", help="where (default: slurm)")
    add("--nodes", type=int, default=1, metavar="N", help="machines (default: 1)")
    add("--gpus", type=int, default=0, metavar="N", help="GPUs of each machine (default: none)")
    add("--processes", type=int, metavar="N", help="processes on each machine (default: one per GPU)")
    cores = (
        "processor cores of each process (default: data.workers + 1, for automatic workers 9 with a GPU; at least 4)"
    )
    add("--cpus", type=int, metavar="N", help=cores)
    add("--mem", type=float, metavar="GB", help="memory of each machine (default: the cluster's)")
    add("--time", default="4h", metavar="4h", help="time limit, then it is requeued: 90m, 4h, 2d (default: 4h)")
    add("--partition", metavar="NAME", help="Slurm partition")
    add("--account", metavar="NAME")
    add("--qos", metavar="NAME")
    add("--constraint", metavar="FEATURE")
    add("--name", default="egohod", help="of the job (default: egohod)")
    add("--requeues", type=int, default=1000, metavar="N", help="how often it may run out of time (default: 1000)")
    before = "from the signal to the end of the time: a step and a checkpoint must fit (default: 120)"
    add("--signal_before", type=int, default=120, metavar="SECONDS", help=before)
    add("--watch", action="store_true", help="print the status line until the end (always with --cluster local)")
    add("--status", metavar="RUN", help="print the status line of a submitted run, and exit")
    add("--dry_run", action="store_true", help="print the sbatch file, submit nothing")
    return parser


if __name__ == "__main__":
    run_tool(main)
