# Sourced by the other scripts: go to the project, have a Python with everything installed, name it $PYTHON.
#
# Uses the active virtual or conda environment, else makes .venv here. What is installed already is skipped.
# EGOHOD_PYTHON=/usr/bin/python3.11 chooses the interpreter that makes .venv.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

_environment=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
if [ -z "$_environment" ]; then
    _environment=$PWD/.venv
    if [ ! -x "$_environment/bin/python" ]; then
        _base=${EGOHOD_PYTHON:-$(command -v python3.11 || command -v python3 || true)}
        if ! "${_base:-false}" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            echo "error: Python 3.11 or newer is needed (found: ${_base:-none}); set EGOHOD_PYTHON=/path/to/python3.11" >&2
            exit 2
        fi
        echo "making a virtual environment in .venv"
        "$_base" -m venv "$_environment" || exit 1
    fi
fi
PYTHON=$_environment/bin/python

# install NAME FILE...: pip install the files' pins once per content.
install() {
    local stamp
    stamp=$_environment/.egohod-$1-$(cat "${@:2}" pyproject.toml | cksum | cut -d' ' -f1)
    [ -e "$stamp" ] && return
    echo "installing $1 packages (once; PyTorch alone is several GB)"
    local files=()
    for file in "${@:2}"; do files+=(-r "$file"); done
    "$PYTHON" -m pip install --quiet --disable-pip-version-check "${files[@]}" || exit 1
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps --editable . || exit 1
    rm -f "$_environment/.egohod-$1-"*
    touch "$stamp"
}
install run requirements.txt
