#!/usr/bin/env bash
# Fine-tuning for EPIC-KITCHENS-100 multi-instance retrieval. Without arguments on the demo world; see exps/finetune.sh.
set -euo pipefail
NAME=ek100_mir DEMO=demo_mir
source "$(dirname "${BASH_SOURCE[0]}")/finetune.sh"
exec "${launch[@]}" main_finetune.py --config_file "$config" "$@"
