#!/usr/bin/env bash
# Zero-shot evaluation: EPIC-KITCHENS-100 action recognition. Without arguments on the demo world; see exps/eval.sh.
set -euo pipefail
BENCHMARK=ek100_cls
source "$(dirname "${BASH_SOURCE[0]}")/eval.sh"
