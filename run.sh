#!/usr/bin/env bash
# Sets up what is missing (Python packages, data), then trains or tests.
#
#   ./run.sh                                  train: fineweb where there are CUDA GPUs, else laptop
#   ./run.sh --track laptop --num_steps 100   arguments go to train_gpt.py (--help lists them)
#   ./run.sh --record 2024-06-06_AdamW        an entry's script: records/<entry>/train_gpt.py
#   ./run.sh test [pytest arguments]          run the tests
#   ./run.sh simulate [my_idea.py]            what would 8 H100s say? Without a GPU, in 11 minutes
#   NPROC=2 ./run.sh                          2 processes (default: one a GPU; without GPUs, one)
#   SHARDS=2 ./run.sh --track fineweb         fetch 2 training shards of 10^8 tokens, not all that
#                                             the run reads
#   PYTHON=python3 ./run.sh                   use this Python as it is and install nothing
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

die() { echo "error: $*" >&2; exit 2; }

# A .venv, built once, and again whenever requirements.txt changes
if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=.venv/bin/python
    if ! cmp -s requirements.txt .venv/requirements.txt; then
        base=$(command -v python3.13 || command -v python3.12 || command -v python3.11 ||
               command -v python3.10 || command -v python3) ||
            die "no python3 found, expected 3.10 or newer; install it or name one in PYTHON"
        # pyenv leaves names on the path that don't run, so the version is asked for
        for candidate in "$base" "$(command -v python3)"; do
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && break
            candidate=
        done
        [[ -n "$candidate" ]] ||
            die "python3 is older than 3.10; install a newer one or name one in PYTHON"
        echo "setting up .venv from requirements.txt (once; this can take minutes) ..."
        rm -rf .venv
        "$candidate" -m venv .venv ||
            die "python3 -m venv failed; on Debian and Ubuntu: apt install python3-venv"
        quiet=--quiet
        [[ ! -t 1 ]] || quiet=--progress-bar=on  # a terminal is shown what happens
        .venv/bin/python -m pip install $quiet --disable-pip-version-check -r requirements.txt ||
            die "pip could not install requirements.txt (see above); mend the network and try again"
        cp requirements.txt .venv/requirements.txt  # last: an interrupted set-up is begun anew
        torch=$("$PYTHON" -c 'import torch; print(torch.__version__)')
        echo "set up .venv: $("$PYTHON" --version), torch $torch"
    fi
fi
command -v "$PYTHON" >/dev/null ||
    die "PYTHON is '$PYTHON', which can't be run; unset it to have a .venv set up"

if [[ "${1:-}" == test ]]; then
    shift
    exec "$PYTHON" -m pytest "$@"
fi
if [[ "${1:-}" == simulate ]]; then
    shift
    [[ "$PYTHON" == .venv/bin/python ]] || export SIMULATE_INSTALLS=no
    exec "$PYTHON" -m tests.simulate "$@"
fi
exec "$PYTHON" launch.py "$@"  # says the track, checks the flags, fetches the data, trains
