#!/usr/bin/env bash
# Sets up what is missing (Python packages, data), then trains, tests or runs a tool.
set -euo pipefail

usage() {
    cat <<'END'
Sets up what is missing (Python packages, data), then trains, tests or runs a tool.

  ./run.sh [flags]                 train on FineWeb if there is a CUDA GPU, else on the laptop track
  ./run.sh --record published/2024-06-06_AdamW [flags]       train with the script of a record
  ./run.sh test [--all] [pytest arguments]                   run the tests
  ./run.sh compare|fair_play|simulate|sample [arguments]     run a tool (--help explains it)

Environment variables:
  NPROC=2          number of processes (default: one per GPU; without GPUs, one)
  SHARDS=2         number of FineWeb training shards to download, 10^8 tokens each (default: 9)
  PYTHON=python3   use this Python as it is, and install nothing (default: set up .venv)

END
}

die() {
    echo "error: $*" >&2
    exit 2
}

find_python() { # names on the PATH can be stubs that do not run, so each one is asked
    local name
    for name in python3.13 python3.12 python3.11 python3.10 python3; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    die "found no Python 3.10 or newer; install one, or name it in PYTHON"
}

set_up_venv() {
    local python progress=--quiet
    python=$(find_python)
    [[ ! -t 1 ]] || progress=--progress-bar=on
    echo "setting up .venv from requirements.txt (once, this can take minutes) ..."
    rm -rf .venv
    "$python" -m venv .venv || die "$python -m venv failed; on Debian: apt install python3-venv"
    .venv/bin/python -m pip install $progress --disable-pip-version-check -r requirements.txt ||
        die "pip could not install requirements.txt (see above); check the network and try again"
    cp requirements.txt .venv/requirements.txt # last, so that an interrupted set-up is repeated
}

case ${PYTHON:-} in # a relative path belongs to the folder of the caller
    /*) ;;
    */*) PYTHON=$PWD/$PYTHON ;;
esac

# Go to the project's folder, also when this file was started by a symbolic link.
self=${BASH_SOURCE[0]}
while [[ -L $self ]]; do
    target=$(readlink "$self")
    case $target in
        /*) self=$target ;;
        *) self=$(dirname -- "$self")/$target ;;
    esac
done
CDPATH='' cd -- "$(dirname -- "$self")"

command=start
case ${1:-} in
    "" | -*) ;;
    test | compare | fair_play | simulate | sample)
        command=$1
        shift
        ;;
    *) die "'$1' is not a command; expected test, compare, fair_play, simulate, sample or flags" ;;
esac

case " $* " in
    *" --help "* | *" -h "*) [[ $command != start ]] || usage ;; # the script's own help follows
esac

if [[ -z ${PYTHON:-} ]]; then
    PYTHON=.venv/bin/python
    [[ -f .venv/requirements.txt && "$(<requirements.txt)" == "$(<.venv/requirements.txt)" ]] ||
        set_up_venv
fi
command -v "$PYTHON" >/dev/null ||
    die "cannot run PYTHON='$PYTHON'; unset PYTHON, and this script sets up .venv"

if [[ $command == test ]]; then
    exec "$PYTHON" -m pytest -n 2 "$@"
fi
exec "$PYTHON" -m "tools.$command" "$@"
