# Sourced by quickstart.sh and test.sh, from the repository's root: puts an environment that holds fastvid on PATH.
#   FASTVID_VENV  an environment that is ready: used as it is, nothing is installed
#   VENV          where to make one otherwise (.venv)
#   PYTHON        the Python, 3.11 or newer, to make it with (python3)

make_environment() { # make_environment [EXTRA], as in pip install fastvid[EXTRA]
  if [[ -n ${FASTVID_VENV:-} ]]; then
    source "$FASTVID_VENV/bin/activate"
    return
  fi
  local venv=${VENV:-.venv} python=${PYTHON:-python3}
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "fastvid needs Python 3.11 or newer; name one: PYTHON=/path/to/python3.12 $0" >&2
    exit 2
  fi
  [[ -x $venv/bin/python ]] || "$python" -m venv "$venv"
  source "$venv/bin/activate"
  python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".${1:+[$1]}"
}
