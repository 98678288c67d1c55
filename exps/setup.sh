# Sourced by the other scripts: go to the project, install the requirements if needed, set $PYTHON.
#
# Uses the active virtual or conda environment, else makes .venv here. Packages installed before are skipped. They are
# installed by uv where there is one, else or if it fails (it does not read pip's configuration) by pip.
# EGOHOD_PYTHON=/usr/bin/python3.11 chooses the interpreter that makes .venv.
# TORCH_INDEX=cu126 (or cu130, cpu) chooses the build of PyTorch. Builds other than the default are in an index of
# PyTorch's own: TORCH_INDEX=ADDRESS/cu126 names it, unless pip's configuration (pip config set global.extra-index-url
# ADDRESS/cu126, PIP_EXTRA_INDEX_URL) does. Which build for which driver: docs/installation.md
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

# pip_install ARGUMENTS...: into the environment of $PYTHON.
pip_install() {
    if command -v uv >/dev/null; then
        # As pip does: the best version of all indexes, not that of the first one with the name.
        uv pip install --quiet --python "$PYTHON" --index-strategy unsafe-best-match "$@" && return
        echo "uv cannot install this; trying pip" >&2
    fi
    "$PYTHON" -m pip install --quiet --disable-pip-version-check "$@"
}

_environment=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
# conda activates its base environment by itself; it should stay free of this project's packages.
if [ -z "${VIRTUAL_ENV:-}" ] && [ "${CONDA_DEFAULT_ENV:-}" = base ]; then _environment=; fi
if [ -z "$_environment" ]; then
    _environment=$PWD/.venv
    if [ ! -w . ] && [ ! -e .venv ]; then
        echo "error: $PWD is read-only, so no virtual environment can be made in it; activate one that is elsewhere" >&2
        exit 2
    fi
    # Debian without python3-venv leaves an environment without pip behind: make it again.
    if ! "$_environment/bin/python" -m pip --version >/dev/null 2>&1 &&
        ! { [ -x "$_environment/bin/python" ] && command -v uv >/dev/null; }; then
        _base=${EGOHOD_PYTHON:-$(command -v python3.11 || command -v python3 || true)}
        if ! "${_base:-false}" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            echo "error: Python 3.11 or newer is needed (found: ${_base:-none}); set EGOHOD_PYTHON=/path/to/python3.11" >&2
            exit 2
        fi
        echo "making a virtual environment in .venv"
        rm -rf "$_environment"
        "$_base" -m venv "$_environment" || { rm -rf "$_environment"; echo "error: no venv module (Debian: apt-get install python3-venv)" >&2; exit 2; }
    fi
fi
PYTHON=$_environment/bin/python
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    ! { command -v uv >/dev/null || "$PYTHON" -c 'import pip' 2>/dev/null; }; then
    echo "error: the active environment $_environment has no Python 3.11 with pip or uv; deactivate it, or install pip there" >&2
    exit 2
fi

# install NAME FILE...: install the files' pins once per content.
install() {
    local stamp
    stamp=$_environment/.egohod-$1-$(cat "${@:2}" pyproject.toml <(pwd; printf %s "${TORCH_INDEX:-}") | cksum | cut -d' ' -f1)
    [ -e "$stamp" ] && return
    local options=() build=${TORCH_INDEX:-} builds=$_environment/.torch-build.txt problem
    [[ $build != *://* ]] || options+=(--extra-index-url "$build")
    build=${build%/} build=${build##*/}
    if [ -n "$build" ]; then
        # All builds of a release satisfy its pin: the constraint is what makes pip take, or change to, this one.
        sed -nE "s/^(torch|torchvision)==([^ ;+]+).*/\1==\2+$build/p" requirements.txt >"$builds"
        options+=(--constraint "$builds")
    else
        # Before gigabytes are downloaded that this machine cannot run. An explicit choice is not questioned.
        problem=$("$PYTHON" -c 'from egohod.runtime import torch_problem; print(torch_problem())' || true)
        if [ -n "$problem" ]; then
            echo "error: $problem; TORCH_INDEX=cpu installs the build without CUDA" >&2
            exit 2
        fi
    fi
    echo "installing $1 packages (once; PyTorch alone is several GB)"
    local files=()
    for file in "${@:2}"; do files+=(-r "$file"); done
    if ! pip_install ${options[@]+"${options[@]}"} "${files[@]}"; then
        [ -z "$build" ] || echo "error: if pip cannot find $(head -n 1 "$builds"), give the address of PyTorch's own index" \
            "for that build, which PyTorch's install page shows: TORCH_INDEX=ADDRESS/$build (docs/installation.md)" >&2
        exit 1
    fi
    # Neither can install a read-only checkout; the scripts run in its folder and do not need it installed.
    if [ -w . ]; then
        pip_install --no-deps --editable . || exit 1
    fi
    rm -f "$_environment/.egohod-$1-"*
    touch "$stamp"
}

install run requirements.txt
