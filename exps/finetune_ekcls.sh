#!/usr/bin/env bash
# Fine-tuning for EPIC-KITCHENS-100 action recognition. Without arguments on the demo world; see exps/finetune.sh.
#SBATCH --signal=B:USR1@120 --requeue --open-mode=append
set -euo pipefail
NAME=ek100_cls DEMO=demo_cls
exps=$(dirname "${BASH_SOURCE[0]}")
[ -e "$exps/finetune.sh" ] || exps=${SLURM_SUBMIT_DIR:-.}/exps # sbatch runs a copy of this file, elsewhere
source "$exps/finetune.sh"
launch_and_leave main_finetune.py --config_file "$config" "$@"
