#!/usr/bin/env bash
# Hand-object narrations from videos; see tools/generate_hod.py, whose arguments these are.
#
#   bash exps/generate_hod.sh                                              the demo world
#   bash exps/generate_hod.sh --metadata narrations.csv --root videos --output hod.csv
#   SHARDS=64 bash exps/generate_hod.sh --metadata ... --root ... --output ...      64 jobs where there is a Slurm
#
# Without Slurm SHARDS is ignored: one run on this machine, in as many processes as the knob workers says. Run again, it
# goes on where it stopped. mediapipe is installed when the configuration asks for it (HOD_EXTRAS=0 installs nothing).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

arguments=("$@")
[ "$#" -gt 0 ] || arguments=(--config_file configs/hod/demo.yml)
if [[ ${HOD_EXTRAS:-1} = 1 && " ${arguments[*]} " != *configs/hod/demo.yml* && " ${arguments[*]} " != *" --help "* ]]; then
    install_mediapipe
fi
shards=${SHARDS:-1}
if [ "$shards" -gt 1 ] && command -v sbatch >/dev/null; then arguments+=(--submit "$shards"); fi
exec "$PYTHON" tools/generate_hod.py "${arguments[@]}"
