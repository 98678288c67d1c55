#!/usr/bin/env bash
# The checks: lint, types, import direction, fast tests.
#
#   bash exps/test.sh               everything that needs minutes at most
#   bash exps/test.sh -m ci         the slower real parts as well (what .ci/run adds); any pytest argument works
#   TEST_PROCESSES=4 bash exps/test.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
install test tests/requirements.txt

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
"$_environment/bin/lint-imports" --no-cache
# Two processes with a thread each are faster than one with two; files stay whole, so that their fixtures are
# made once, and come in the order of tests/conftest.py.
exec "$PYTHON" -m pytest -n "${TEST_PROCESSES:-2}" --dist loadfile --no-loadscope-reorder "$@"
