# Sourced by exps/finetune_*.sh, which set NAME (the part of configs/finetune) and DEMO (its demo version).
#
# Without arguments, START_WEIGHTS and CONFIG: the demo world, rendered if absent, from the demo checkpoint that all
# scripts share, trained if absent. Else the arguments are main_finetune.py's, on the benchmark itself, e.g.
#   EK100_ANNOTATIONS=... EK100_VIDEOS=... bash exps/finetune_mir.sh model.weights.path=runs/clip_base
# exps/launch.sh says how they are spread over processes and machines. Run again, it goes on where it stopped.
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

config=${CONFIG:-configs/finetune/$NAME.yml}
if [ "$#" = 0 ] && [ -z "${START_WEIGHTS:-}${CONFIG:-}" ]; then
    config=configs/finetune/$DEMO.yml
    demo_world --benchmarks
    demo_checkpoint
fi
