#!/usr/bin/env bash
# Stage two: co-train both paths of EgoVideo from a trained dual encoder.
#
#   bash exps/pretrain_adapter.sh                                                 the demo world, no GPU needed
#   EGO4D_ROOT=... HOD_CSV=... DUAL_ENCODER=runs/clip_base bash exps/pretrain_adapter.sh
#   ... bash exps/pretrain_adapter.sh train.trainable=adapters                    only the adapters, for small GPUs
#
# All else is as in exps/pretrain.sh.
#SBATCH --signal=B:USR1@120 --requeue --open-mode=append
exps=$(dirname "$0") && [ -e "$exps/pretrain.sh" ] || exps=${SLURM_SUBMIT_DIR:-.}/exps # sbatch runs a copy of this file
RECIPE=configs/config/egovideo_base.yml DEMO=configs/demo_egovideo.yml source "$exps/pretrain.sh"
