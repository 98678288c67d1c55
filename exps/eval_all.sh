#!/usr/bin/env bash
# Zero-shot evaluation: every benchmark whose data is found. Without arguments on the demo world; see exps/eval.sh.
set -euo pipefail
BENCHMARK=all
source "$(dirname "${BASH_SOURCE[0]}")/eval.sh"
