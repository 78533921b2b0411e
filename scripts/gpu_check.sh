#!/usr/bin/env bash
# Test the kernels and benchmark those that pass, in under nine minutes: bash scripts/gpu_check.sh [--small] [--kernels A,B]
# Or measure training steps, in under nine minutes more: bash scripts/gpu_check.sh --train [--preset h200-13b] [--rows A,B]
# (models of LLaMA's true sizes with random weights, which lie in TMPDIR: 14 GB for 7B, 26 GB for 13B; flags of
# bench/train_step.py; without a GPU it takes tiny sizes).
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
needed=(torch triton transformers matplotlib)
[[ ${1:-} == --train ]] || needed+=(pytest pytest_benchmark hypothesis)
"${PYTHON:-python3}" - "${needed[@]}" <<'CHECK'
import importlib.util, sys
missing = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"{sys.executable} lacks {', '.join(missing)}: FASTVID_VENV=FOLDER names an environment that has them")
CHECK
if [[ ${1:-} == --train ]]; then
  shift
  preset=$("${PYTHON:-python3}" -c 'import torch; print("h200-7b" if torch.cuda.is_available() else "tiny-gpu")')
  [[ $preset == h200-7b ]] || echo "no GPU: tiny sizes, which show that everything runs and measure nothing" >&2
  mkdir -p "${OUT:=bench/results}"
  exec "${PYTHON:-python3}" bench/train_step.py --preset "$preset" --limit 500 --out "$OUT" "$@"
fi
exec "${PYTHON:-python3}" -m bench.check "$@"
