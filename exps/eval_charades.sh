#!/usr/bin/env bash
# Zero-shot evaluation: Charades-Ego. Without arguments on the demo world; see exps/eval.sh.
set -euo pipefail
BENCHMARK=charades_ego
source "$(dirname "${BASH_SOURCE[0]}")/eval.sh"
