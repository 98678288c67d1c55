#!/usr/bin/env bash
# Fine-tuning for EPIC-KITCHENS-100 action recognition. Without arguments on the demo world; see exps/finetune.sh.
set -euo pipefail
NAME=ek100_cls DEMO=demo_cls
source "$(dirname "${BASH_SOURCE[0]}")/finetune.sh"
exec "${launch[@]}" main_finetune.py --config_file "$config" "$@"
