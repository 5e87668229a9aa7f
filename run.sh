#!/usr/bin/env bash
# Sets up what is missing (Python packages, data), then trains, tests or runs a tool.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started as `sh run.sh`
set -euo pipefail
unset PYTHONSAFEPATH # Python finds tools/ and data/ in the working directory

usage() {
    cat <<'END'
Sets up what is missing (Python packages, data), then trains, tests or runs a tool.

  ./run.sh [flags]                 train on FineWeb if there is a CUDA GPU, else on the laptop track
  ./run.sh my_idea.py [flags]      the same with an edited copy of train_gpt.py
  ./run.sh --record published/2024-06-06_AdamW [flags]       train with the script of a record
  ./run.sh test [--all] [pytest arguments]                   run the tests
  ./run.sh compare|fair_play|simulate|sample|export [arguments]   run a tool (--help explains it)

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

is_python() { # names on the PATH can be stubs that do not run, so each one is asked
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

find_python() {
    local name
    for name in python3.13 python3.12 python3.11 python3.10 python3; do
        if is_python "$name"; then
            echo "$name"
            return
        fi
    done
    die "found no Python 3.10 or newer; install one, or name it in PYTHON"
}

# This script builds a .venv where there is none, and deletes only one that it built itself. The mark
# is written before anything else, so that an interrupted set-up is repeated. Earlier versions wrote
# no mark, but a copy of requirements.txt at the end.
mark=.venv/made_by_run.sh

is_free() { # whether .venv does not exist or is an empty folder
    [[ ! -L .venv ]] || return 1
    [[ -e .venv ]] || return 0
    [[ -d .venv ]] || return 1
    (
        shopt -s dotglob nullglob
        set -- .venv/*
        (($# == 0))
    )
}

is_own() {
    [[ ! -L .venv && (-f $mark || -f .venv/requirements.txt) ]]
}

is_complete() {
    [[ -x .venv/bin/python && -f .venv/requirements.txt &&
        "$(<requirements.txt)" == "$(<.venv/requirements.txt)" ]]
}

set_up_venv() {
    local python file progress=--quiet
    if [[ -f $mark && ! -f .venv/requirements.txt ]] && kill -0 "$(<"$mark")" 2>/dev/null; then
        die "process $(<"$mark") is setting up .venv; wait until it has ended, or end it"
    fi
    python=$(find_python)
    [[ ! -t 1 ]] || progress=--progress-bar=on
    echo "setting up .venv from requirements.txt (once, this can take minutes) ..."
    { mkdir -p .venv && echo $$ >"$mark"; } 2>/dev/null ||
        die "can't write $PWD/.venv; name a Python that has the packages in PYTHON="
    (
        shopt -s dotglob nullglob
        for file in .venv/requirements.txt .venv/*; do # .venv itself can be a mount point
            [[ $file == "$mark" ]] || rm -rf -- "$file"
        done
    )
    "$python" -m venv .venv || die "$python -m venv failed; on Debian: apt install python3-venv"
    .venv/bin/python -m pip install $progress --disable-pip-version-check -r requirements.txt ||
        die "pip could not install requirements.txt (see above); check the network and try again"
    cp requirements.txt .venv/requirements.txt # last: it says that all packages are there
}

check_packages() { # of a .venv that somebody else built
    local missing
    missing=$(.venv/bin/python -c '
import re
from importlib.metadata import PackageNotFoundError, version

missing = []
for name in dict.fromkeys(re.findall(r"^[\w-]+", open("requirements.txt").read(), re.M)):
    try:
        version(name)
    except PackageNotFoundError:
        missing.append(name)
print(*missing)
' 2>/dev/null) || missing="a Python that runs"
    [[ -z $missing ]] ||
        die "run.sh did not make .venv, and it lacks $missing; install what is missing," \
            "name another Python in PYTHON=, or move it away: mv .venv .venv.mine"
}

caller=$PWD
case ${PYTHON:-} in # a relative path belongs to the folder of the caller
    /*) ;;
    */*) PYTHON=$caller/$PYTHON ;;
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
CDPATH='' cd -P -- "$(dirname -- "$self")" # -P: a link's target can go up from a linked folder
[[ -f tools/start.py ]] ||
    die "$PWD is not the project's folder; start its run.sh there, or by a symbolic link to it"

command=start
case ${1:-} in
    test | compare | fair_play | simulate | sample | export)
        command=$1
        shift
        ;;
    *.py) # a script, but --entry=x.py is a flag
        case $1 in
            /*) script=$1 ;;
            *)
                script=$caller/$1
                [[ -f $script ]] || script=$PWD/$1
                ;;
        esac
        if [[ -f $script ]]; then
            set -- "$script" "${@:2}"
        elif [[ $1 != -* ]]; then
            die "there is no script '$1' in $caller or in $PWD"
        fi
        ;;
    "" | -*) ;;
    *)
        die "'$1' is not a command; expected test, compare, fair_play, simulate, sample, export," \
            "a script that ends in .py, or flags"
        ;;
esac

case " $* " in
    *" --help "* | *" -h "*) [[ $command != start ]] || usage ;; # the script's own help follows
esac

if [[ -n ${PYTHON:-} ]]; then
    is_python "$PYTHON" ||
        die "PYTHON='$PYTHON' is not Python 3.10 or newer; unset it, and this script sets up .venv"
else
    PYTHON=.venv/bin/python
    if is_free || is_own; then
        is_complete || set_up_venv
    else
        check_packages
    fi
fi

if [[ $command == test ]]; then
    exec "$PYTHON" -m pytest -n 2 "$@"
fi
exec "$PYTHON" -m "tools.$command" "$@"
