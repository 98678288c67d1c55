#!/usr/bin/env bash
# Fine-tuning: EGTEA Gaze+, its three splits and their mean. Without arguments on the demo world; see exps/finetune.sh.
#SBATCH --signal=B:USR1@120 --requeue --open-mode=append
exps=$(dirname "$0") && [ -e "$exps/finetune.sh" ] || exps=${SLURM_SUBMIT_DIR:-.}/exps # sbatch runs a copy of this file
source "$exps/finetune.sh" egtea "$@"
