#!/usr/bin/env bash
# Fine-tuning for EGTEA Gaze+: its three splits one after the other, then the mean. Without arguments on the demo world;
# see exps/finetune.sh. The configuration's train.output must depend on SPLIT.
set -euo pipefail
NAME=egtea DEMO=demo_egtea
source "$(dirname "${BASH_SOURCE[0]}")/finetune.sh"
folders=()
RUNS=runs/$(basename "$config" .yml)
for split in 1 2 3; do
    SPLIT=$split "${launch[@]}" main_finetune.py --config_file "$config" "$@"
    folders+=("${RUNS}_split$split")
done
exec "$PYTHON" tools/mean_results.py "${folders[@]}"
