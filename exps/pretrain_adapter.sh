#!/usr/bin/env bash
# Stage two on one machine: co-train both paths of EgoVideo from a trained dual encoder.
#
#   EGO4D_ROOT=... HOD_CSV=... DUAL_ENCODER=runs/clip_base bash exps/pretrain_adapter.sh
#   CONFIG=configs/demo_egovideo.yml bash exps/pretrain_adapter.sh                the demo world, no GPU needed
#   bash exps/pretrain_adapter.sh train.trainable=adapters                        only the adapters, for small GPUs
#   bash exps/pretrain_adapter.sh --dry_run                                       look first
#
# PROCESSES is one per GPU unless set. Run again, it goes on where it stopped. The demo world is rendered if it is not
# there (DEMO_DATA, default demo_data).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

config=${CONFIG:-configs/config/egovideo_base.yml}
data=${DEMO_DATA:-demo_data}
if [[ $config == configs/demo* && ! -e $data/test ]]; then "$PYTHON" tools/make_demo_data.py --output "$data"; fi
processes=${PROCESSES:-$("$PYTHON" -c "import torch; print(max(1, torch.cuda.device_count()))")}
launch=("$PYTHON")
# One process needs no launcher, which would hide the exit code.
[ "$processes" = 1 ] || launch+=(-m torch.distributed.run --standalone --nproc_per_node="$processes")
exec "${launch[@]}" main_pretrain.py --config_file "$config" "$@"
