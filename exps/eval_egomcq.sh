#!/usr/bin/env bash
# Zero-shot evaluation: EgoMCQ. Without arguments on the demo world; see exps/eval.sh.
set -euo pipefail
BENCHMARK=egomcq
source "$(dirname "${BASH_SOURCE[0]}")/eval.sh"
