#!/usr/bin/env bash
# The main job on the embedded demo world: render narrated clips, train, evaluate on held-out kitchens.
#
#   bash exps/demo.sh                      about ten minutes on two CPU cores, 4.9 GB of disk for decoded frames until
#                                          its end; no download of data or weights
#   bash exps/demo.sh --short              the same steps in about two minutes (too short for meaningful numbers)
#   bash exps/demo.sh train.seed=1         any knob of main_pretrain.py --help, for both stages of the training
#
# Rerun to resume after an interruption; a finished run prints its table again.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

data=demo_data scale=1.0 folder=runs/demo overrides=()
if [ "${1:-}" = --short ]; then
    shift
    data=demo_data_short scale=0.1 folder=runs/demo_short
    overrides=("train.duration=20 steps" "train.warmup=5 steps" "train.save_every=10 steps" "evaluate.every=10 steps")
fi
export DEMO_DATA=${DEMO_DATA:-$data}
"$PYTHON" tools/make_demo_data.py --output "$DEMO_DATA" --scale "$scale"
# Two loader processes share the cores with the model: waiting threads must not spin (a third faster on two cores).
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
# First what is done with which object, then, from those weights, in which order it happens.
train_demo "$folder" ${overrides[@]+"${overrides[@]}"} "$@"
