#!/usr/bin/env bash
# The launchers on a real Slurm: two virtual nodes on this machine, trainings over gloo on a small demo world.
#
#   bash tests/slurm/run.sh            everything
#   bash tests/slurm/run.sh --short    the first two parts: a job on both nodes; stopped, requeued, the same weights
#
# Debian's slurm-wlm and munge are installed if they are absent. All else stays in a temporary folder (kept, and named,
# when something fails), and everything started here is ended by pid. Needs root; exit code 77 when it cannot run here.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../../exps/setup.sh"
install test tests/requirements.txt
source "$here/cluster.sh"

if [ "$(id -u)" != 0 ]; then
    echo "skipped: tests/slurm/run.sh starts Slurm's daemons and has to be root" >&2
    exit 77
fi
if ! command -v slurmctld munged slurmd >/dev/null; then
    if ! command -v apt-get >/dev/null; then
        echo "skipped: no Slurm here, and no apt-get to install slurm-wlm and munge with" >&2
        exit 77
    fi
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge >/dev/null
fi

work=$(mktemp -d)
chmod 755 "$work"
began=$SECONDS
finish() {
    local status=$?
    trap - EXIT
    cluster_down
    if [ "$status" = 0 ]; then rm -rf "$work"; else echo "FAILED; what was said is in $work" >&2; fi
    exit "$status"
}
trap finish EXIT
trap 'exit 130' INT TERM

part() { echo "[$((SECONDS - began)) s] $*"; }
fail() {
    echo "error: $1" >&2
    [ -z "${2:-}" ] || tail -n 40 "$2" >&2
    exit 1
}

# wait_until WHAT FILE CONDITION...: within ten minutes, which is for machines that do other things as well.
wait_until() {
    local what=$1 file=$2 end=$((SECONDS + 600))
    shift 2
    until "$@"; do
        [ "$SECONDS" -lt "$end" ] || fail "$what never came" "$file"
        sleep 0.2
    done
}
said() { grep -q -e "$1" "$2" 2>/dev/null; }
state() { timeout 20 scontrol show job --oneliner "$1" | grep -o " $2=[^ ]*" | cut -d= -f2; }
# over JOB: it has ended. One that waits in the queue because it was sent back starts at once instead of in two minutes,
# but not in the same second: Slurm then takes its credential for the one that it has just revoked.
over() {
    case $(state "$1" JobState) in
        PENDING) sleep 3 && timeout 20 scontrol update JobId="$1" StartTime=now 2>/dev/null || true ;;
        COMPLETED | FAILED | CANCELLED | TIMEOUT | NODE_FAIL | OUT_OF_MEMORY) return 0 ;;
    esac
    return 1
}
# ends JOB STATE RESTARTS FILE: wait for it, and see how it ended.
ends() {
    wait_until "the end of job $1" "$4" over "$1"
    [ "$(state "$1" JobState)" = "$2" ] || fail "job $1 ended as $(state "$1" JobState)" "$4"
    [ "$(state "$1" Restarts)" = "$3" ] || fail "job $1 was restarted $(state "$1" Restarts) times, not $3" "$4"
}
restarted() { [ "$(state "$1" Restarts)" = 1 ]; }
submit() { sbatch --parsable -N2 --ntasks-per-node=2 --cpus-per-task=1 --output="$work/job-%j.out" "$@"; }
newest_step() { "$PYTHON" -c "import sys; from tests.support import *; print(newest(Path(sys.argv[1])).step)" "$1"; }
export PYTHONPATH=$PWD OMP_NUM_THREADS=1 EGOHOD_MEETING_SECONDS=300
unset RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT

cluster_up "$work/slurm"
part "a Slurm of two nodes (${NODE_NAMES[*]}) is up"
"$PYTHON" tools/make_demo_data.py --output "$work/world" --scale 0.03 --workers 2 --benchmarks 2>/dev/null
"$PYTHON" -c "import sys; from tests.support import *; write_tiny_config(*map(Path, sys.argv[1:]))" "$work" "$work/world"
steps=30
training=(exps/pretrain.sh --config_file "$work/tiny.yml" "train.duration=$steps steps" data.workers=1)

straight=$(submit "${training[@]}" train.output="$work/straight")
ends "$straight" COMPLETED 0 "$work/job-$straight.out"
said "4 processes over gloo" "$work/job-$straight.out" || fail "not four processes" "$work/job-$straight.out"
part "sbatch exps/pretrain.sh: two nodes, two tasks each, trained to step $(newest_step "$work/straight")"

broken=$(submit "${training[@]}" train.output="$work/broken")
wait_until "step 5" "$work/job-$broken.out" said "step 5/$steps" "$work/job-$broken.out"
scancel --signal=USR1 "$broken"
ends "$broken" COMPLETED 1 "$work/job-$broken.out"
said "SIGUSR1 received" "$work/job-$broken.out" || fail "no signal came" "$work/job-$broken.out"
said "resuming .* at step" "$work/job-$broken.out" || fail "it did not go on" "$work/job-$broken.out"
"$PYTHON" tests/slurm/same_runs.py "$work/straight" "$work/broken"
part "scancel --signal=USR1: saved, returned to the queue, went on, and ended the same"
[ "${1:-}" != --short ] || exit 0

# Stopped by the user, it does not come back.
cancelled=$(submit "${training[@]}" train.output="$work/cancelled")
wait_until "step 5" "$work/job-$cancelled.out" said "step 5/$steps" "$work/job-$cancelled.out"
scancel "$cancelled"
ends "$cancelled" CANCELLED 0 "$work/job-$cancelled.out"
[ "$(newest_step "$work/cancelled")" -lt "$steps" ] || fail "it was done before it was cancelled"
part "scancel: saved at step $(newest_step "$work/cancelled"), not requeued"

# by_submitit NAME: sets $job and $log.
by_submitit() {
    job=$("$PYTHON" tools/submit.py "$work/tiny.yml" "train.duration=$steps steps" data.workers=1 train.output="$work/$1" \
        --nodes 2 --gpus 2 --cpus 1 --time 20m --signal_before 60 | sed -n 's/^job \([0-9]*\);.*/\1/p')
    log=$work/$1/submitted/${job}_0_log.err
    wait_until "step 5" "$log" said "step 5/$steps" "$log"
}

by_submitit preempted
scancel --signal=USR2 "$job"
ends "$job" COMPLETED 1 "$log"
"$PYTHON" tests/slurm/same_runs.py "$work/straight" "$work/preempted"
"$PYTHON" tools/submit.py --status "$work/preempted" | grep "FINISHED  step $steps/$steps"
part "tools/submit.py: preempted by its signal, requeued, ended the same"

# The training stands still until its time is up, so that this is the same on a fast machine and on a slow one.
by_submitit timed
seconds=$(($(date +%s) - $(date -d "$(state "$job" StartTime)" +%s)))
mapfile -t frozen < <(pgrep -f "main_pretrain.py .*train.output=$work/timed")
kill -STOP "${frozen[@]}"
scontrol update JobId="$job" TimeLimit=$((seconds / 60 + 2))
wait_until "the signal before the time is up" "$log" said "Caught signal SIGUSR2" "$log"
kill -CONT "${frozen[@]}"
wait_until "the return to the queue" "$log" restarted "$job"
scontrol update JobId="$job" TimeLimit=20
ends "$job" COMPLETED 1 "$log"
"$PYTHON" tests/slurm/same_runs.py "$work/straight" "$work/timed"
part "tools/submit.py: out of time, saved, requeued, ended the same"

export DEMO_DATA=$work/world
measuring=(exps/eval_mir.sh --config_file configs/demo_eval.yml --checkpoint "$work/straight" evaluate.cache=null)
PROCESSES=1 bash "${measuring[@]}" --output "$work/alone" >"$work/alone.log" 2>&1 || fail "no evaluation" "$work/alone.log"
evaluation=$(submit "${measuring[@]}" --output "$work/shared")
ends "$evaluation" COMPLETED 0 "$work/job-$evaluation.out"
"$PYTHON" tests/slurm/same_results.py "$work/alone/results.json" "$work/shared/results.json"
part "sbatch exps/eval_mir.sh: the numbers of four tasks on two nodes are those of one process"

narrating=(exps/generate_hod.sh --config_file configs/hod/demo.yml demo.folder=null block=16 workers=1 slurm.memory_gb=1)
bash "${narrating[@]}" output="$work/alone.csv" >"$work/narrated.log" 2>&1 || fail "no narrations" "$work/narrated.log"
SHARDS=3 bash "${narrating[@]}" output="$work/sharded.csv" >"$work/sharded.log" 2>&1 || fail "not submitted" "$work/sharded.log"
merge=$(sed -n 's/.* submitted the merge as job \([0-9]*\).*/\1/p' "$work/sharded.log")
ends "$merge" COMPLETED 0 "$work/sharded.log"
cmp "$work/alone.csv" "$work/sharded.csv"
part "SHARDS=3 exps/generate_hod.sh: an array and a merge wrote the $(wc -l <"$work/alone.csv") lines of one run"

# Somebody else's port: the first task names it, and srun ends the others, who wait for that listener to answer.
"$PYTHON" -c "
import socket, time
with socket.create_server(('', 17899)):
    time.sleep(600)" &
listener=$!
code=0
MASTER_PORT=17899 timeout 120 srun -N2 -n4 --kill-on-bad-exit=1 "$PYTHON" main_pretrain.py \
    --config_file "$work/tiny.yml" train.output="$work/port" >"$work/port.log" 2>&1 || code=$?
kill "$listener"
[ "$code" != 0 ] && [ "$code" != 124 ] || fail "exit code $code" "$work/port.log"
said "^error: port 17899 of .* is taken" "$work/port.log" || fail "the port was not named" "$work/port.log"
part "a taken port: named by the first process, and the whole step ends"

code=0
timeout 500 srun -N2 -n2 "$PYTHON" main_pretrain.py --config_file "$work/tiny.yml" train.device=cuda \
    train.output="$work/no_gpu" >"$work/no_gpu.log" 2>&1 || code=$?
[ "$code" = 2 ] || fail "exit code $code, not 2" "$work/no_gpu.log"
said "may have asked for none" "$work/no_gpu.log" || fail "no word about GPUs" "$work/no_gpu.log"
part "train.device=cuda without a GPU: said, exit code 2"
