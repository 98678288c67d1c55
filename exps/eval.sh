#!/usr/bin/env bash
# Zero-shot evaluation of one benchmark, or of all: bash exps/eval.sh BENCHMARK [main_eval.py arguments].
# exps/eval_*.sh call it, one for each BENCHMARK (a name of evaluate.benchmarks).
#
#   bash exps/eval_mir.sh         the demo world, rendered if absent, with one demo checkpoint that all these scripts
#                                 share, trained if absent
#   bash exps/eval_mir.sh --config_file configs/config/clip_base_eval.yml --checkpoint base_best.pt --metadata ... --root ...
#
# exps/launch.sh distributes it over processes and machines (sbatch -N2 exps/eval_mir.sh ..., PROCESSES=2).
set -euo pipefail
benchmark=${1:?names a benchmark of configs/benchmarks.yml, or all}
shift
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

arguments=("$@")
if [ "$#" = 0 ]; then
    demo_world --benchmarks
    demo_checkpoint
    arguments=(--config_file configs/demo_eval.yml --checkpoint "$DEMO_CHECKPOINT" --output "results/demo_$benchmark"
        --controls shuffle,reverse,freeze)
fi
launch_and_leave main_eval.py --benchmark "$benchmark" "${arguments[@]}"
