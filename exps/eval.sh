# Sourced by exps/eval_*.sh, which set BENCHMARK: what to run, with what, and whether under Slurm.
#
# Without arguments: the demo world, rendered if absent, with one demo checkpoint that all scripts share, trained if
# absent. With arguments they are main_eval.py's, e.g.
#   bash exps/eval_mir.sh --config_file configs/config/clip_base_eval.yml --checkpoint base_best.pt --metadata ... --root ...
# In a Slurm job (sbatch -N2 exps/eval_mir.sh ... from this project's folder, or in salloc) every task is one process of
# the evaluation; PROCESSES=2 does so without Slurm.
if [ -n "${SLURM_STEP_ID:-}" ] && [ "${SLURM_NTASKS:-1}" != 1 ]; then
    echo "error: this script starts the tasks itself: sbatch it, or run it with bash in salloc, but not with srun" >&2
    exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

# Loader processes share the cores with the model: a thread that waits must not spin.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
arguments=("$@")
if [ "$#" = 0 ]; then
    export DEMO_DATA=${DEMO_DATA:-demo_data}
    checkpoint=${DEMO_CHECKPOINT:-runs/demo}
    "$PYTHON" tools/make_demo_data.py --output "$DEMO_DATA" --scale "${DEMO_SCALE:-1.0}" --benchmarks
    if ! ls "$checkpoint"/checkpoints/step-* >/dev/null 2>&1; then
        echo "no checkpoint in $checkpoint yet: training one (DEMO_CHECKPOINT=... names another)"
        "$PYTHON" main_pretrain.py --config_file configs/demo.yml train.output="$checkpoint"
    fi
    arguments=(--config_file configs/demo_eval.yml --checkpoint "$checkpoint" --output "results/demo_$BENCHMARK"
        --controls shuffle,reverse,freeze)
fi
command=(main_eval.py --benchmark "$BENCHMARK" "${arguments[@]}")
if [ -n "${SLURM_JOB_ID:-}" ] && [ -z "${SLURM_STEP_ID:-}" ] && command -v srun >/dev/null; then
    # Each task finds its place in Slurm's variables, as torchrun's processes find theirs in the environment.
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))} PYTHON
    # srun no longer takes this over from sbatch by itself.
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
    exec srun --kill-on-bad-exit=1 bash -c \
        'export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID; exec "$PYTHON" "$@"' \
        evaluate "${command[@]}"
elif [ "${PROCESSES:-1}" != 1 ]; then
    exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$PROCESSES" "${command[@]}"
fi
exec "$PYTHON" "${command[@]}"
