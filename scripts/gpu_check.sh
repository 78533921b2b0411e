#!/usr/bin/env bash
# Test the kernels and benchmark those that pass, in under nine minutes: bash scripts/gpu_check.sh [--small] [--kernels A,B]
# Needs torch, triton, transformers, pytest, pytest-benchmark, hypothesis and matplotlib; installs nothing. Libraries to
# compare with (liger-kernel, bitsandbytes, quack-kernels) get rows where they are installed. Without a GPU it takes a CPU.
#   FASTVID_VENV    an environment to use      PYTHON  its Python otherwise (python3)
#   OUT             where results go (bench/results)
#   FASTVID_COMMIT  the commit, where the tree has no history
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -n ${FASTVID_VENV:-} ]]; then
  source "$FASTVID_VENV/bin/activate"
fi
export PYTHONPATH=.:kernels${PYTHONPATH:+:$PYTHONPATH}
exec "${PYTHON:-python3}" -m bench.check "$@"
