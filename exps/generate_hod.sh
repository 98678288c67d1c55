#!/usr/bin/env bash
# Hand-object narrations from videos; the arguments are those of tools/generate_hod.py.
#
#   bash exps/generate_hod.sh                                                       the demo world
#   bash exps/generate_hod.sh --metadata narrations.csv --root videos --output hod.csv
#   SHARDS=64 bash exps/generate_hod.sh --metadata ... --root ... --output ...      64 jobs on a Slurm cluster
#
# Without Slurm, SHARDS is ignored: one run on this machine with `workers` processes. Rerun to resume.
# The detector MediaPipe is installed into .mediapipe (or EGOHOD_MEDIAPIPE).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

arguments=("$@")
[ "$#" -gt 0 ] || arguments=(--config_file configs/hod/demo.yml)
# Errors are silenced here because the program below reports mistakes in the arguments itself.
detector=$("$PYTHON" tools/generate_hod.py "${arguments[@]}" --which_detector 2>/dev/null || true)
folder=${EGOHOD_MEDIAPIPE:-.mediapipe}
if [ "$detector" = mediapipe ] && [ ! -d "$folder/mediapipe" ]; then
    echo "installing MediaPipe into $folder (once)"
    pip_install --no-deps --target "$folder" -r egohod/hod/detectors/mediapipe_requirements.txt
fi
if [ "${SHARDS:-1}" -gt 1 ] && command -v sbatch >/dev/null; then arguments+=(--submit "$SHARDS"); fi
exec "$PYTHON" tools/generate_hod.py "${arguments[@]}"
