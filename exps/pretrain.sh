#!/usr/bin/env bash
# Pretraining. Arguments are main_pretrain.py's; exps/launch.sh distributes it over GPUs and machines.
#
#   bash exps/pretrain.sh                                      the demo world, rendered if absent
#   EGO4D_ROOT=... HOD_CSV=... CLIP_WEIGHTS=... bash exps/pretrain.sh               ViT-B/16, the published recipe
#   EGO4D_ROOT=... ... bash exps/pretrain.sh --dry_run                              what it would do
#   CONFIG=configs/own.yml bash exps/pretrain.sh                                    any other configuration
#   sbatch -N2 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=12 exps/pretrain.sh      two nodes of a Slurm cluster
#
# Rerun to resume.
#SBATCH --signal=B:USR1@120 --requeue --open-mode=append
set -euo pipefail
exps=$(dirname "${BASH_SOURCE[0]}") && [ -e "$exps/launch.sh" ] || exps=${SLURM_SUBMIT_DIR:-.}/exps # sbatch runs a copy
source "$exps/launch.sh"

config=${CONFIG:-${RECIPE:-configs/config/clip_base.yml}}
if [ "$#" = 0 ] && [ -z "${CONFIG:-}${EGO4D_ROOT:-}" ]; then
    config=${DEMO:-configs/demo.yml}
    echo "neither arguments nor EGO4D_ROOT: $config"
fi
[[ $config != configs/demo* ]] || demo_world
launch_and_leave main_pretrain.py --config_file "$config" "$@"
