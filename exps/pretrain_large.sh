#!/usr/bin/env bash
# Pretraining of the large model: ViT-L/14 at 336 px on Ego4D and HowTo100M, the published recipe. Without a demo version.
#
#   EGO4D_ROOT=... HOWTO_ROOT=... HOD_CSV=... CLIP_WEIGHTS=... bash exps/pretrain_large.sh --dry_run
#
# All else is as in exps/pretrain.sh.
#SBATCH --signal=B:USR1@120 --requeue --open-mode=append
exps=$(dirname "$0") && [ -e "$exps/pretrain.sh" ] || exps=${SLURM_SUBMIT_DIR:-.}/exps # sbatch runs a copy of this file
RECIPE=configs/config/clip_large.yml DEMO=configs/config/clip_large.yml source "$exps/pretrain.sh"
