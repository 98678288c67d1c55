#!/usr/bin/env bash
# Fine-tuning for one task: bash exps/finetune.sh TASK [main_finetune.py arguments]. TASK is a file of configs/finetune;
# exps/finetune_*.sh call it, one for each TASK.
#
#   bash exps/finetune_mir.sh     the demo version of the task: its world, rendered if absent, from the demo checkpoint
#                                 that all these scripts share, trained if absent
#   EK100_ANNOTATIONS=... EK100_VIDEOS=... bash exps/finetune_mir.sh model.weights.path=runs/clip_base
#
# With arguments, START_WEIGHTS or CONFIG the task itself is trained. exps/launch.sh distributes it over processes and
# machines. Rerun to resume.
set -euo pipefail
task=${1:?names a file of configs/finetune, such as ek100_mir}
shift
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

config=${CONFIG:-configs/finetune/$task.yml}
if [ "$#" = 0 ] && [ -z "${START_WEIGHTS:-}${CONFIG:-}" ]; then
    short=${task#ek100_} # demo_mir.yml, demo_cls.yml, demo_egtea.yml, demo_charades.yml
    config=configs/finetune/demo_${short%_ego}.yml
    demo_world --benchmarks
    demo_checkpoint
fi
[ "$task" = egtea ] || launch_and_leave main_finetune.py --config_file "$config" "$@"

# EGTEA Gaze+ has three splits and reports their mean. The configuration's files must depend on SPLIT.
case " $* " in *" train.output="*)
    echo "error: train.output would be one folder for three splits; they go to runs/<configuration>_split1 to 3" >&2
    exit 2 ;;
esac
folders=()
for SPLIT in 1 2 3; do
    export SPLIT
    folders+=("runs/$(basename "$config" .yml)_split$SPLIT")
    launch main_finetune.py --config_file "$config" "train.output=${folders[-1]}" "$@"
done
exec "$PYTHON" tools/mean_results.py "${folders[@]}"
