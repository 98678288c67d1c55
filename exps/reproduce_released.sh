#!/usr/bin/env bash
# A released checkpoint on every benchmark whose data exists: our number, the published one and the difference.
#
#   EK100_ANNOTATIONS=... EK100_VIDEOS=... bash exps/reproduce_released.sh CHECKPOINT [MODEL] [main_eval.py arguments]
#
# MODEL is a row of the published table (default EgoVideo-L), whose family decides the protocol (docs/evaluation.md);
# CONFIG is configs/config/clip_large_eval.yml unless set.
# configs/benchmarks.yml lists the variables that name the folders of the benchmarks.
#SBATCH --signal=B:USR1@120 --requeue --open-mode=append
set -euo pipefail
if [ "$#" = 0 ]; then
    sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
checkpoint=$1 model=${2:-EgoVideo-L}
shift "$(($# > 1 ? 2 : 1))"
case $model in
    AVION-*) protocol=avion ;;
    LaViLa-*) protocol=lavila ;;
    *) protocol=upstream ;;
esac
exps=$(dirname "$0") && [ -e "$exps/eval.sh" ] || exps=${SLURM_SUBMIT_DIR:-.}/exps # sbatch runs a copy of this file
source "$exps/eval.sh" all --config_file "${CONFIG:-configs/config/clip_large_eval.yml}" --checkpoint "$checkpoint" \
    --published "$model" --output "results/$model" "evaluate.protocol=$protocol" "$@"
