# shellcheck shell=bash
# Sourced by the other scripts: enters the checkout and a virtual environment that holds this project.
#
#   source launch/environment.sh EXTRAS
#
# The environment is the active one, or .venv in the checkout, made with $PYTHON (python3.12, python3.11 or python3,
# the first found) when it is not there.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

if [[ -z "${VIRTUAL_ENV:-}" ]]; then
  if [[ ! -x .venv/bin/python ]]; then
    for python in ${PYTHON:-python3.12 python3.11 python3}; do
      # pyenv's shims exist for versions that are not active: only a Python that runs counts.
      if "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2> /dev/null; then
        "$python" -m venv .venv
        break
      fi
    done
    if [[ ! -x .venv/bin/python ]]; then
      echo "error: no Python 3.11 or 3.12 found (tried ${PYTHON:-python3.12, python3.11, python3}); name one in PYTHON" >&2
      exit 1
    fi
  fi
  # shellcheck source=/dev/null
  source .venv/bin/activate
fi

echo "== installing dreamllm_jax[$1] into $VIRTUAL_ENV"
# pip compiles 25,000 files on one core; compileall on all of them. Some files are no Python, which does not matter.
python -m pip install --quiet --disable-pip-version-check --no-compile --editable ".[$1]"
python -W ignore -m compileall -qq --workers 0 "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" || true
python -m pip check

# Torch is an option here: transformers need not remark on its absence.
export TRANSFORMERS_NO_ADVISORY_WARNINGS=1
