# Sourced by exps/finetune_*.sh, which set NAME (the part of configs/finetune) and DEMO (its demo version).
#
# Without arguments: the demo world, rendered if absent, from the demo checkpoint that all scripts share, trained if
# absent. With arguments they are main_finetune.py's, on the benchmark itself, e.g.
#   EK100_ANNOTATIONS=... EK100_VIDEOS=... bash exps/finetune_mir.sh model.weights.path=runs/clip_base
# PROCESSES is one per GPU unless set. Run again, it goes on where it stopped.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

config=${CONFIG:-configs/finetune/$NAME.yml}
if [ "$#" = 0 ]; then
    config=${CONFIG:-configs/finetune/$DEMO.yml}
    export DEMO_DATA=${DEMO_DATA:-demo_data} DEMO_CHECKPOINT=${DEMO_CHECKPOINT:-runs/demo}
    export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
    "$PYTHON" tools/make_demo_data.py --output "$DEMO_DATA" --scale "${DEMO_SCALE:-1.0}" --benchmarks
    if ! ls "$DEMO_CHECKPOINT"/checkpoints/step-* >/dev/null 2>&1; then
        echo "no checkpoint in $DEMO_CHECKPOINT yet: training one (DEMO_CHECKPOINT=... names another)"
        "$PYTHON" main_pretrain.py --config_file configs/demo.yml train.output="$DEMO_CHECKPOINT"
    fi
fi
processes=${PROCESSES:-$("$PYTHON" -c "import torch; print(max(1, torch.cuda.device_count()))")}
launch=("$PYTHON")
# One process needs no launcher, which would hide the exit code.
[ "$processes" = 1 ] || launch+=(-m torch.distributed.run --standalone --nproc_per_node="$processes")
