#!/usr/bin/env bash
# Zero-shot evaluation: EGTEA Gaze+ action recognition. Without arguments on the demo world; see exps/eval.sh.
set -euo pipefail
BENCHMARK=egtea
source "$(dirname "${BASH_SOURCE[0]}")/eval.sh"
