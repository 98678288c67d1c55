# Sourced by exps/eval_*.sh, which set BENCHMARK: what to run, with what.
#
# Without arguments: the demo world, rendered if absent, with one demo checkpoint that all scripts share, trained if
# absent. With arguments they are main_eval.py's, e.g.
#   bash exps/eval_mir.sh --config_file configs/config/clip_base_eval.yml --checkpoint base_best.pt --metadata ... --root ...
# exps/launch.sh says how they are spread over processes and machines (sbatch -N2 exps/eval_mir.sh ..., PROCESSES=2).
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

arguments=("$@")
if [ "$#" = 0 ]; then
    demo_world --benchmarks
    demo_checkpoint
    arguments=(--config_file configs/demo_eval.yml --checkpoint "$DEMO_CHECKPOINT" --output "results/demo_$BENCHMARK"
        --controls shuffle,reverse,freeze)
fi
launch_and_leave main_eval.py --benchmark "$BENCHMARK" "${arguments[@]}"
