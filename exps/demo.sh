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
exec "$PYTHON" -m egohod demo "$@"
