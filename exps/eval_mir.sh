#!/usr/bin/env bash
# Zero-shot evaluation: EPIC-KITCHENS-100 multi-instance retrieval. Without arguments on the demo world; see exps/eval.sh.
set -euo pipefail
BENCHMARK=ek100_mir
source "$(dirname "${BASH_SOURCE[0]}")/eval.sh"
