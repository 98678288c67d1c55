#!/usr/bin/env bash
# Fine-tuning: EPIC-KITCHENS-100 action recognition. Without arguments on the demo world; see exps/finetune.sh.
#SBATCH --signal=B:USR1@120 --requeue --open-mode=append
exps=$(dirname "$0") && [ -e "$exps/finetune.sh" ] || exps=${SLURM_SUBMIT_DIR:-.}/exps # sbatch runs a copy of this file
source "$exps/finetune.sh" ek100_cls "$@"
