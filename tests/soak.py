"""Kill a run of two processes at random moments, let it go on, and compare it with one that nobody killed.

    bash tests/soak.sh [--trials 20] [--seed 0] [--work runs/soak] [--output docs/results/soak.json]

A trial is a training run that is killed once and started again: SIGKILL of one rank or of both, or SIGTERM of
one, in a step, a save or an evaluation. Then the final weights must be the bits of the undisturbed run, metrics.jsonl
must have the same losses and scores, and every checkpoint that was ever there under its name must be readable. What is
done is in --work; rerun to resume with the next trial (of the same code).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from egohod.demo import make_world
from egohod.distributed import source_hash
from egohod.runtime import UNFINISHED_PREFIX
from egohod.training.checkpoint import CheckpointStore, read
from egohod.training.telemetry import git_commit
from tests.ranks import Ranks
from tests.support import newest, write_tiny_config

STEPS, SAVE_EVERY, EVALUATE_EVERY = 12, 3, 4
# Seconds, at most, from the moment that is waited for to the signal: the last steps take longer, and a save is over in
# some milliseconds.
LONGEST = {"step": 0.3, "evaluation": 0.3, "save": 0.02}
KINDS, PHASES = ("SIGKILL one rank", "SIGKILL both ranks", "SIGTERM one rank"), ("step", "save", "evaluation")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/soak"))
    parser.add_argument("--output", type=Path, default=Path("docs/results/soak.json"))
    args = parser.parse_args()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "world").is_dir():
        make_world(work / "world", seed=0, scale=0.03, workers=1)
    config = write_tiny_config(work, work / "world")
    notes = work / "trials.json"
    done = json.loads(notes.read_text()) if notes.is_file() else {}
    if done.get("source") != source_hash() or done.get("seed") != args.seed:
        shutil.rmtree(work / "undisturbed", ignore_errors=True)
        done = {"source": source_hash(), "commit": git_commit(), "seed": args.seed, "trials": []}
    codes = start(config, work / "undisturbed").wait()
    assert codes == [0, 0], codes
    for number in range(len(done["trials"]), args.trials):
        done["trials"].append(trial(number, args.seed, config, work))
        notes.write_text(json.dumps(done, indent=1))
        print(json.dumps(done["trials"][-1]), flush=True)
    trials = done["trials"][: args.trials]
    failed = [each["trial"] for each in trials if not each["passed"]]
    result = {name: done[name] for name in ("commit", "source", "seed")} | {
        "command": "bash tests/soak.sh",
        "processes": 2,
        "steps": STEPS,
        "passed": len(trials) - len(failed),
        "failed": failed,
        "trials": trials,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['passed']} of {len(trials)} kills passed: {args.output}")
    return 1 if failed else 0


def start(config: Path, run: Path) -> Ranks:
    """Two ranks that train into ``run``, or go on there."""
    knobs = {
        "model.num_frames": 2,
        "data.workers": 1,
        "train.output": run,
        "train.duration": f"{STEPS} steps",
        "train.global_batch_size": 4,
        "train.max_batch_per_process": 4,
        "train.save_every": f"{SAVE_EVERY} steps",
        "evaluate.every": f"{EVALUATE_EVERY} steps",
        "evaluate.during": "[val]",
        "evaluate.best": "val/map",
        "evaluate.benchmarks.val.kind": "custom",
        "evaluate.benchmarks.val.layout": "chunks",
        "evaluate.benchmarks.val.protocol": "as_trained",
        "evaluate.benchmarks.val.metadata": run.parent / "world" / "val" / "hod.csv",
        "evaluate.benchmarks.val.root": run.parent / "world" / "val" / "videos",
        # Many small batches: an evaluation that is long enough to be hit.
        "evaluate.batch_size": 1,
    }
    settings = [f"{name}={value}" for name, value in knobs.items()]
    return Ranks(2, "main_pretrain.py", ["--config_file", config, *settings], run.with_name(f"{run.name}_logs"))


def trial(number: int, seed: int, config: Path, work: Path) -> dict[str, object]:
    """One killed run; what was done to it and what came of it."""
    order = [(kind, phase) for phase in PHASES for kind in KINDS]
    random.Random(f"{seed} {number // len(order)}").shuffle(order)
    kind, phase = order[number % len(order)]
    rng = random.Random(f"{seed} {number}")
    run = work / "killed"
    shutil.rmtree(run, ignore_errors=True)
    began = time.monotonic()
    ranks = start(config, run)
    at = wait_for_phase(ranks, run, phase, rng)
    chosen = [0, 1] if kind == "SIGKILL both ranks" else [rng.randrange(2)]
    ranks.send(signal.SIGTERM if kind.startswith("SIGTERM") else signal.SIGKILL, *chosen)
    codes = ranks.wait()
    left = list((run / "checkpoints").glob(f"{UNFINISHED_PREFIX}*"))
    # The rank that died is named by the launcher, which is not here (tests/training/test_ranks.py).
    problems = [] if all(codes) or kind.startswith("SIGTERM") else [f"exit codes {codes}"]
    problems += [f"exit codes {codes}"] if kind.startswith("SIGTERM") and codes != [0, 0] else []
    problems += unreadable(run)
    resumed = start(config, run)
    again = resumed.wait()
    problems += [f"the resumed run ends with {again}"] if again != [0, 0] else compare(work / "undisturbed", run)
    problems += unreadable(run)
    return {
        "trial": number,
        "kill": kind,
        "ranks": chosen,
        "during": phase,
        "at": at,
        "half-written checkpoint left": bool(left),
        "exit codes": codes,
        "resumed at": _resumed_at(resumed),
        "seconds": round(time.monotonic() - began, 1),
        "problems": problems,
        "passed": not problems,
    }


def wait_for_phase(ranks: Ranks, run: Path, phase: str, rng: random.Random) -> str:
    """Return at a random moment of a random step, save or evaluation: its log text."""
    if phase == "step":
        text = f"step {rng.randrange(1, STEPS)}/"
        ranks.wait_for(text)
    elif phase == "evaluation":
        # Never the last one: on a fast machine the run would be over before it is killed.
        text = f"evaluating the model of step {rng.randrange(EVALUATE_EVERY, STEPS, EVALUATE_EVERY)}\n"
        ranks.wait_for(text)
    else:
        checkpoint = f"step-{rng.randrange(SAVE_EVERY, STEPS, SAVE_EVERY):08d}"
        text = f"unfinished {checkpoint}"
        # The unfinished folder is there for some milliseconds, which a busy machine may miss: the finished one counts.
        while not any(name.endswith(checkpoint) for name in _names(run / "checkpoints")):
            assert ranks.processes[0].is_alive(), ranks.log()
            time.sleep(0.001)
    time.sleep(rng.uniform(0, LONGEST[phase]))
    return text.strip().rstrip("/")


def _names(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []


def _resumed_at(ranks: Ranks) -> int:
    lines = [line for line in ranks.log().splitlines() if "resuming" in line]
    return int(lines[0].split(" at step ")[1].split()[0]) if lines else 0


def unreadable(run: Path) -> list[str]:
    """Checkpoints under their final names that cannot be read."""
    problems = []
    for path in CheckpointStore(run).steps():
        try:
            read(path)
        except ValueError as error:
            problems.append(str(error))
    return problems


def compare(one: Path, other: Path) -> list[str]:
    """How two finished runs differ: weights and averages to the bit, losses and scores to the last digit."""
    expected, actual = newest(one).weights, newest(other).weights
    problems = [f"{name} differs" for name, weight in expected.items() if not torch.equal(weight, actual[name])]
    if _metrics(one) != _metrics(other):
        problems.append("metrics.jsonl differs")
    return problems


def _metrics(run: Path) -> list[dict[str, float]]:
    """The content of metrics.jsonl but speeds and sizes, which no two runs share."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    same = ("train/loss", "train/accuracy", "train/grad_norm", "train/lr", "train/skipped", "step")
    return [{name: line[name] for name in line if name in same or name.startswith("val/")} for line in lines]


if __name__ == "__main__":
    sys.exit(main())
