#!/usr/bin/env bash
# Stage two on one machine: co-train both paths of EgoVideo from a trained dual encoder.
#
#   EGO4D_ROOT=... HOD_CSV=... DUAL_ENCODER=runs/clip_base bash exps/pretrain_adapter.sh
#   CONFIG=configs/demo_egovideo.yml PROCESSES=1 bash exps/pretrain_adapter.sh    the demo world, no GPU
#   bash exps/pretrain_adapter.sh train.trainable=adapters                        only the adapters, for small GPUs
#   bash exps/pretrain_adapter.sh --dry_run                                       look first
#
# PROCESSES is one per GPU unless set. Run again, it goes on where it stopped.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="${PROCESSES:-gpu}" \
    main_pretrain.py --config_file "${CONFIG:-configs/config/egovideo_base.yml}" "$@"
