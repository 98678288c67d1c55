#!/usr/bin/env bash
# Twenty kills at random moments of a training on two processes; see tests/soak.py. Resumable.
#
#   bash tests/soak.sh                     four to twenty minutes on two cores; writes docs/results/soak.json
#   bash tests/soak.sh --trials 3 --output /tmp/soak.json
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../exps/setup.sh"
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE CUDA_VISIBLE_DEVICES= PYTHONPATH=.
exec "$PYTHON" -m tests.soak "$@"
