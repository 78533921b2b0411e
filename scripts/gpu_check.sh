#!/usr/bin/env bash
# Measure fastvid on this machine's GPU, whatever crashes or hangs on the way:
#   bash scripts/gpu_check.sh [--stages probe,correct,train,kernels,libraries,sweep,extract,tests,sanitizer] [--minutes 15] [--out FOLDER]
# Results are appended to FOLDER/results.jsonl one by one; docs: bench/README.md. Models of random weights (14 GB for 7B) go
# to /dev/shm, or to TMPDIR where that has no room. Needs torch, triton and transformers, installs nothing, and compares with
# liger-kernel and bitsandbytes where they are installed. Without a GPU it runs everything at tiny sizes.
#   FASTVID_VENV            an environment to use      PYTHON  its Python otherwise (python3)
#   OUT                     the folder, where --out does not name it (gpu_check)
#   FASTVID_COMMIT          the commit, where the tree has no history
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -n ${FASTVID_VENV:-} ]]; then
  source "$FASTVID_VENV/bin/activate"
fi
export PYTHONPATH=.:kernels${PYTHONPATH:+:$PYTHONPATH}
"${PYTHON:-python3}" - torch triton transformers <<'CHECK'
import importlib.util, sys
missing = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"{sys.executable} lacks {', '.join(missing)}: FASTVID_VENV=FOLDER names an environment that has them")
CHECK
exec "${PYTHON:-python3}" -m bench.gpu "$@"
