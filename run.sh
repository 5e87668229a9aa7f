#!/usr/bin/env bash
# Sets up what is missing (Python packages, data), then trains or tests.
#
#   ./run.sh                                      train: fineweb where there are CUDA GPUs, laptop elsewhere
#   ./run.sh --track laptop --num_steps 100       arguments go to train_gpt.py (./run.sh --help lists them)
#   ./run.sh --record 2024-06-06_AdamW            train with an entry's script: records/<entry>/train_gpt.py
#   ./run.sh test [pytest arguments]              run the tests
#   NPROC=2 ./run.sh                              2 processes (default: one a GPU; without GPUs, one)
#   SHARDS=2 ./run.sh --track fineweb             fetch 2 training shards of 10^8 tokens instead of all that a run reads
#   PYTHON=python3 ./run.sh                       use this Python as it is and install nothing
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

die() { echo "error: $*" >&2; exit 2; }

# --- Python: a .venv, built once and again whenever requirements.txt changes --------------------------------------------
if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=.venv/bin/python
    if ! cmp -s requirements.txt .venv/requirements.txt; then
        base=$(command -v python3.13 || command -v python3.12 || command -v python3.11 || command -v python3.10 ||
               command -v python3) || die "no python3 found, expected 3.10 or newer; install it or name one in PYTHON"
        # pyenv leaves names on the path that don't run, so the version is asked for, not read off the name
        for candidate in "$base" "$(command -v python3)"; do
            "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2])' 2>/dev/null && break
            candidate=
        done
        [[ -n "$candidate" ]] || die "python3 is older than 3.10; install a newer one or name one in PYTHON"
        echo "setting up .venv from requirements.txt (once; torch is large, so this can take minutes) ..."
        rm -rf .venv
        "$candidate" -m venv .venv || die "python3 -m venv failed; on Debian and Ubuntu: apt install python3-venv"
        quiet=--quiet
        [[ ! -t 1 ]] || quiet=--progress-bar=on  # a terminal is shown what happens
        .venv/bin/python -m pip install $quiet --disable-pip-version-check -r requirements.txt ||
            die "pip could not install requirements.txt (see above); mend the network and run the command again"
        cp requirements.txt .venv/requirements.txt  # last: an interrupted set-up is begun anew
        echo "set up .venv: $(.venv/bin/python --version), torch $(.venv/bin/python -c 'import torch; print(torch.__version__)')"
    fi
fi

command -v "$PYTHON" >/dev/null || die "PYTHON is '$PYTHON', which can't be run; unset it to have a .venv set up"

if [[ "${1:-}" == test ]]; then
    shift
    exec "$PYTHON" -m pytest "$@"
fi
script=train_gpt.py
words=()
while (($#)); do
    case "$1" in
        --record) entry=${2:-}; shift; (($# == 0)) || shift ;;
        --record=*) entry=${1#--record=}; shift ;;
        *) words+=("$1"); shift; continue ;;
    esac
    script=records/$entry/train_gpt.py
    [[ -n "$entry" && -f "$script" ]] ||
        die "--record is '$entry', expected one of: $(cd records && printf '%s\n' */train_gpt.py | sed 's|/.*||' | paste -sd' ')"
done
set -- ${words[@]+"${words[@]}"}
for word in "$@"; do
    [[ "$word" != -h && "$word" != --help ]] || exec "$PYTHON" "$script" "$@"
done

# --- Track and processes ------------------------------------------------------------------------------------------------
gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
track=
previous=
for word in "$@"; do
    [[ "$previous" != --track ]] || track=$word
    [[ "$word" != --track=* ]] || track=${word#--track=}
    previous=$word
done
if [[ -z "$track" ]]; then
    if ((gpus > 0)); then track=fineweb; else track=laptop; fi
    echo "track $track, for there are $gpus CUDA GPUs (choose with --track)"
    set -- --track "$track" "$@"
fi
nproc=${NPROC:-$((gpus > 0 ? gpus : 1))}
[[ "$nproc" =~ ^[1-9][0-9]*$ ]] || die "NPROC is '$nproc', expected a number of processes from 1 on: NPROC=2 ./run.sh"
[[ "${SHARDS:-1}" =~ ^[1-9][0-9]*$ ]] || die "SHARDS is '$SHARDS', expected a number from 1 on: SHARDS=9 ./run.sh"
# A wrong flag is said before gigabytes are fetched for it. Prints how many shards of 10^8 tokens the run reads.
shards=$("$PYTHON" -c '
import math, sys
sys.path.insert(0, sys.argv[1])
from train_gpt import check_hyperparameters, parse_arguments, run_as_program
def check():
    check_hyperparameters(hp := parse_arguments(sys.argv[3:]), int(sys.argv[2]))
    print(math.ceil(hp.num_steps * hp.step_tokens / 10**8))
sys.exit(run_as_program(check))
' "$(dirname "$script")" "$nproc" "$@")

# --- Data ---------------------------------------------------------------------------------------------------------------
case "$track" in
    laptop) "$PYTHON" -m data.laptop ;;
    fineweb) "$PYTHON" -m data.fineweb --shards "${SHARDS:-$shards}" ;;
esac

# --- Train --------------------------------------------------------------------------------------------------------------
if ((nproc == 1)); then
    exec "$PYTHON" "$script" "$@"
fi
cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > nproc ? cores / nproc : 1))}
# torchrun itself, but a failed run ends with the script's own line and exit code, not with torchrun's traceback.
exec "$PYTHON" -c '
import logging, sys
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main
logging.disable(logging.ERROR)
try:
    main()
except SignalException as stop:
    sys.exit(128 + stop.sigval)
except ChildFailedError as error:
    killed = {rank: -failure.exitcode for rank, failure in error.failures.items() if failure.exitcode < 0}
    killed = {rank: n for rank, n in killed.items() if n != 15} or killed  # torchrun ended the others by signal 15
    for rank, number in killed.items():
        print(f"error: rank {rank} was killed by signal {number}, so the others were ended; go on with --resume latest",
              file=sys.stderr)
    sys.exit(128 + max(killed.values()) if killed else error.get_first_failure()[1].exitcode)
' --standalone --nproc_per_node="$nproc" "$script" "$@"
