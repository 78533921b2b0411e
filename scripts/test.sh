#!/usr/bin/env bash
# Make an environment with the tested versions and run the tests: bash scripts/test.sh [pytest's arguments]
# Variables: see environment.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
make_environment test
unset PYTHONDONTWRITEBYTECODE # each process that a test starts would compile all that it imports
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # two processes of two threads each on two cores are four times slower
several=(-n auto --maxprocesses 8 --dist loadgroup --no-loadscope-reorder)
for argument in "$@"; do
  [[ $argument == tests/* ]] && several=() # a few files are done before further processes are ready
done
exec python -m pytest "${several[@]}" "$@"
