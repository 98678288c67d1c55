# Sourced by the scripts that run a program: `launch PROGRAM ARGUMENTS...` starts it on the available devices.
#
#   in a Slurm job                      every task is one process: sbatch -N2 --ntasks-per-node=8 --gpus-per-node=8
#                                       --cpus-per-task=12 exps/pretrain.sh ..., from this project's folder, or the
#                                       script with bash in salloc. Partition, account and time are sbatch's flags.
#   NODES=4 MASTER_ADDR=node1           torchrun, on each of four machines
#   PROCESSES=8                         torchrun with eight processes on this machine (default: one per GPU)
#
# RESTARTS=3 lets torchrun restart all processes from the last checkpoint when one dies. A Slurm job whose time is
# up, or that is preempted, saves and goes back to the queue (sbatch --no-requeue: it ends). docs/launching.md
# The shell of srun --ntasks=4 --pty bash has a terminal, the tasks of a step have none (see egohod/runtime.py).
_in_interactive_shell() {
    [ -n "${SLURM_PTY_PORT:-}" ] && [ "${SLURM_TASK_PID:-}" != $$ ] && { : </dev/tty; } 2>/dev/null
}
if [ -n "${SLURM_STEP_ID:-}" ] && [ "${SLURM_STEP_NUM_TASKS:-1}" != 1 ] && ! _in_interactive_shell; then
    echo "error: this script starts the tasks itself: sbatch it, or run it with bash in salloc, but not with srun" >&2
    exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
# Loader processes share the cores with the model: waiting threads must not spin.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}

# launch PROGRAM ARGUMENTS...: returns when the program is done. The script exits when the program fails, or was
# stopped before its end.
launch() {
    local folder=$PWD
    [ -w "$folder" ] || folder=${TMPDIR:-/tmp}
    export EGOHOD_UNFINISHED=$folder/.unfinished-${SLURM_JOB_ID:-$$}
    rm -f "$EGOHOD_UNFINISHED"
    if _in_allocation; then
        _slurm_step "$@"
    else
        _command "$@"
        "${command[@]}"
    fi
    if [ -e "$EGOHOD_UNFINISHED" ]; then
        rm -f "$EGOHOD_UNFINISHED"
        ! _in_allocation || _requeue
        echo "not finished; rerun to resume from the last checkpoint"
        exit 0
    fi
}

# launch_and_leave PROGRAM ARGUMENTS...: launch as the last command of a script; signals to the script reach the program.
launch_and_leave() {
    if ! _in_allocation; then
        _command "$@"
        exec "${command[@]}"
    fi
    launch "$@"
    exit
}

# 4294967290 is the step in which salloc itself runs the shell on some clusters.
_in_allocation() { [ -n "${SLURM_JOB_ID:-}" ] && [ "${SLURM_STEP_ID:-4294967290}" = 4294967290 ]; }

# _command PROGRAM ARGUMENTS...: sets $command, the command line outside Slurm.
_command() {
    local processes=${PROCESSES:-}
    [ -n "$processes" ] || processes=$("$PYTHON" -c "import torch; print(max(1, torch.cuda.device_count()))")
    command=("$PYTHON")
    # One process needs no launcher, which would hide the exit code.
    if [ "${NODES:-1}" != 1 ]; then
        if [ -z "${LOCAL_ADDR:-}" ] && ! "$PYTHON" -c "import socket; socket.getaddrinfo(socket.gethostname(), 0)" 2>/dev/null; then
            echo "error: the name of this node, $(hostname), does not resolve; LOCAL_ADDR=... gives its address" >&2
            exit 2
        fi
        command+=(-m torch.distributed.run --nnodes="$NODES" --rdzv_backend=c10d
            --rdzv_endpoint="${MASTER_ADDR:?names the first of the NODES}:${MASTER_PORT:-29500}")
        [ -z "${LOCAL_ADDR:-}" ] || command+=(--local_addr="$LOCAL_ADDR")
    elif [ "$processes" != 1 ] || [ -n "${RESTARTS:-}" ]; then
        # By address: torchrun waits for ever on a node whose own name does not resolve.
        command+=(-m torch.distributed.run --standalone --local_addr=127.0.0.1)
    fi
    # Each restart meets at a store of its own: that of the first start has the addresses of dead processes in it.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    # torchrun's own default leaves SIGUSR1 out, and dies of it.
    export TORCHELASTIC_SIGNALS_TO_HANDLE=${TORCHELASTIC_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}
    [ "${#command[@]}" = 1 ] || command+=(--nproc_per_node="$processes" --max_restarts="${RESTARTS:-0}")
    command+=("$@")
}

# _slurm_step PROGRAM ARGUMENTS...: as a step of this job.
_slurm_step() {
    local step status=0 stop_requested=
    if ! command -v srun >/dev/null; then
        echo "error: this is Slurm job $SLURM_JOB_ID, but there is no srun on the PATH of $(hostname)" >&2
        exit 2
    fi
    command -v scontrol >/dev/null ||
        echo "warning: no scontrol on the PATH of $(hostname): this job cannot return to the queue by itself" >&2
    if [ "${SLURM_GPUS_ON_NODE:-0}" -gt 1 ] && [[ ${SLURM_TASKS_PER_NODE:-1} =~ ^1($|\() ]]; then
        echo "warning: $SLURM_GPUS_ON_NODE GPUs a node but one task, which uses one: --ntasks-per-node=$SLURM_GPUS_ON_NODE" >&2
    fi
    # srun no longer takes this over from sbatch by itself.
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
    srun --kill-on-bad-exit=1 "$PYTHON" "$@" &
    step=$!
    # sbatch --signal=B:USR1@120 tells this shell alone; scancel --signal tells the step alone.
    trap 'stop_requested=yes; kill -USR1 $step 2>/dev/null || true' USR1 TERM
    # A signal ends a wait early.
    while wait "$step" || true; kill -0 "$step" 2>/dev/null; do :; done
    wait "$step" || status=$?
    trap - USR1 TERM
    [ "$status" != 0 ] || return 0
    # A program that does not know the signal dies of it; what it has saved so far counts. An error stays one.
    [ -n "$stop_requested" ] && [ "$status" -gt 128 ] || exit "$status"
    touch "$EGOHOD_UNFINISHED"
}

# _requeue: back to the queue, unless there is none to return to or the job was cancelled.
_requeue() {
    local job
    if ! command -v scontrol >/dev/null; then
        echo "error: cannot return to the queue: no scontrol on the PATH of $(hostname); submit this again" >&2
        exit 2
    fi
    job=$(scontrol show job --oneliner "$SLURM_JOB_ID")
    if [[ $job == *" BatchFlag=1 "* && $job == *" JobState=RUNNING "* && $job == *" Requeue=1 "* ]]; then
        echo "not finished: job $SLURM_JOB_ID returns to the queue"
        scontrol requeue "$SLURM_JOB_ID"
        # Slurm ends this shell.
        sleep 60
    fi
}

# demo_world [make_demo_data.py ARGUMENTS...]: render it if it is absent.
demo_world() {
    export DEMO_DATA=${DEMO_DATA:-demo_data}
    "$PYTHON" tools/make_demo_data.py --output "$DEMO_DATA" --scale "${DEMO_SCALE:-1.0}" "$@"
}

# demo_checkpoint: train the one that all scripts share if it is absent. The script exits when that fails or is stopped.
demo_checkpoint() {
    export DEMO_CHECKPOINT=${DEMO_CHECKPOINT:-runs/demo}
    ls "$DEMO_CHECKPOINT"/checkpoints/step-* >/dev/null 2>&1 && return
    echo "no checkpoint in $DEMO_CHECKPOINT yet: training one (DEMO_CHECKPOINT=... names another)"
    # A run that a signal stops ends with 0 too.
    local -x EGOHOD_UNFINISHED=${TMPDIR:-/tmp}/egohod-unfinished-$$
    rm -f "$EGOHOD_UNFINISHED"
    "$PYTHON" -m egohod demo --scale "${DEMO_SCALE:-1.0}" train.output="$DEMO_CHECKPOINT"
    if [ -e "$EGOHOD_UNFINISHED" ]; then
        rm -f "$EGOHOD_UNFINISHED"
        exit 0
    fi
}
