#!/usr/bin/env bash
# Zero-shot evaluation: every benchmark whose data exists. Without arguments on the demo world; see exps/eval.sh.
# There it takes four and a half minutes on two cores, most of them for clips that one benchmark alone has: val, egtea,
# charades_ego, handyvqa and the recordings of ego4d_nlq. Features are cached.
#SBATCH --signal=B:USR1@120 --requeue --open-mode=append
exps=$(dirname "$0") && [ -e "$exps/eval.sh" ] || exps=${SLURM_SUBMIT_DIR:-.}/exps # sbatch runs a copy of this file
source "$exps/eval.sh" all "$@"
