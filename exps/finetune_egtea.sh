#!/usr/bin/env bash
# Fine-tuning for EGTEA Gaze+: its three splits one after the other, then the mean. Without arguments on the demo world;
# see exps/finetune.sh. The configuration's files must depend on SPLIT; each split gets a folder of its own, so
# train.output cannot be an argument.
#SBATCH --signal=B:USR1@120 --requeue --open-mode=append
set -euo pipefail
NAME=egtea DEMO=demo_egtea
exps=$(dirname "${BASH_SOURCE[0]}")
[ -e "$exps/finetune.sh" ] || exps=${SLURM_SUBMIT_DIR:-.}/exps # sbatch runs a copy of this file, elsewhere
source "$exps/finetune.sh"
case " $* " in *" train.output="*)
    echo "error: train.output would be one folder for three splits; they go to runs/<configuration>_split1 to 3" >&2
    exit 2 ;;
esac
folders=()
RUNS=runs/$(basename "$config" .yml)
for split in 1 2 3; do
    export SPLIT=$split
    folders+=("${RUNS}_split$split")
    launch main_finetune.py --config_file "$config" "train.output=${folders[-1]}" "$@"
done
exec "$PYTHON" tools/mean_results.py "${folders[@]}"
