"""Reads logs of GPT-2 speedrun runs, judges claims and shows differences.

    python -m tools.compare table records/                           # a row for each entry's claim
    python -m tools.compare verify NEW --baseline OLD                # does the claim hold?
    python -m tools.compare diff OLD NEW                             # code, settings, results
    python -m tools.compare plot OLD NEW -o curves.svg               # the loss curves
    python -m tools.compare report OLD NEW -o report.html            # everything on one page
    python -m tools.compare extract LOG -o train_gpt.py              # the script that a log embeds
    python -m tools.compare runs-needed --sd 0.0013 --margin 0.001   # how many runs a claim needs
    python -m tools.compare ab OLD.py NEW.py --runs 5 -- --track laptop   # run both alternately

PATH, OLD and NEW are logs, folders (searched for .txt and .log files) or globs. Logs of this
project and of modded-nanogpt are read. Exit code 1: the claim does not hold; 2: a mistake.
"""
import argparse
import sys

from data import UserError, run_as_program

from .difference import diff, extract
from .logs import TARGET
from .page import report
from .plots import plot
from .stats import runs_needed
from .table import table
from .verdict import verify


def ab(args) -> int:
    """Runs two scripts alternately, A B A B ..., with the seeds 0, 1, ... for both, then judges B
    against A. Each run is started as run.sh starts it: one process per GPU, or NPROC of them.
    Started again after an interruption, ab keeps the complete runs of the same script and flags on
    the same hardware.
    """
    from .ab import ab  # imports what the other commands do not need
    return ab(args)


def print_runs_needed(args) -> int:
    """Prints how many runs a claim needs."""
    for name, value in (("sd", args.sd), ("margin", args.margin)):
        if value <= 0:
            raise UserError(f"--{name} is {value}, expected more than 0")
    if not 0 < args.p < 0.5:
        raise UserError(f"--p is {args.p}, expected between 0 and 0.5")
    exact = runs_needed(args.sd, args.margin, args.p)
    probable = runs_needed(args.sd, args.margin, args.p, power=0.8)
    print(f"{exact} runs give p <= {args.p:g} if their mean lies exactly {args.margin:g} below the "
          f"target and their standard deviation is {args.sd:g}")
    print(f"{probable} runs give it with a probability of 80%")
    return 0


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports a mistake in one line, without its usage."""

    def error(self, message):
        raise UserError(f"{message}; python -m tools.compare --help shows the commands")


def make_parser() -> Parser:
    """The commands and their flags."""
    parser = Parser(prog="python -m tools.compare", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)

    def command(function, help, name=None):
        name = name or function.__name__
        added = commands.add_parser(name, help=help, description=function.__doc__)
        added.set_defaults(function=function)
        return added.add_argument

    def add_target(add):
        add("--target", type=float, help=f"loss to reach (default: the log's own, else {TARGET})")

    def add_rules(add):
        add_target(add)
        add("--p", type=float, default=0.01, help="bound of the p-values (default %(default)s)")
        add("--systems-only", action="store_true", help="the same mathematics is only faster: "
            "instead of reaching the target, the loss must not get worse")

    add = command(table, "one row for each entry's claim, or for each group of runs")
    add("paths", nargs="+", metavar="PATH")
    add("--all", action="store_true", help="all groups of comparable runs, all columns, all notes")
    add("--markdown", action="store_true", help="a table for a pull request")
    add("--json", action="store_true", help="all groups as a list of objects")
    add_target(add)

    add = command(verify, "apply the rules to a claim; exit code 0 or 1")
    add("candidate", nargs="+", metavar="CANDIDATE", help="logs, or a folder that holds them")
    add("--baseline", nargs="+", metavar="OLD", help="likewise (default: baseline/ in CANDIDATE)")
    add_rules(add)

    add = command(diff, "what differs: code, hyperparameters, environment, results")
    add("a", metavar="A")
    add("b", metavar="B")

    add = command(plot, "validation loss against steps, tokens and training time")
    add("paths", nargs="+", metavar="PATH")
    add("-o", "--out", required=True, help=".svg, .png or .pdf to write")
    add_target(add)

    add = command(report, "everything about logs, or about B against A, as one HTML page")
    add("paths", nargs="+", metavar="PATH", help="an entry's folder; or A and B; or any other logs")
    add("-o", "--out", default="report.html", help=".html to write (default %(default)s)")
    add_rules(add)

    add = command(extract, "write the script that a log embeds")
    add("log", metavar="LOG")
    add("-o", "--out", required=True)

    add = command(print_runs_needed, "how many runs a claim needs", name="runs-needed")
    add("--sd", type=float, required=True, help="standard deviation of the final loss")
    add("--margin", type=float, required=True, help="how far the mean lies below the target")
    add("--p", type=float, default=0.01, help="bound of the p-value (default %(default)s)")

    add = command(ab, "run two scripts alternately, A B A B ..., then verify B against A")
    add("a", metavar="A", help="the baseline's script")
    add("b", metavar="B", help="the candidate's script; both get the flags that follow --")
    add("--runs", type=int, required=True, help="runs of each script, with seeds 0, 1, ...")
    add("--fresh", action="store_true", help="repeat runs that are complete")
    add_rules(add)
    return parser


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The arguments; for ab, what follows -- is args.args, the flags of both scripts. Raises
    UserError."""
    end = argv.index("--") if argv[:1] == ["ab"] and "--" in argv else len(argv)
    args = make_parser().parse_args(argv[:end])
    args.args = argv[end + 1:]
    return args


def run(argv: list[str]) -> int:
    """Runs a command; returns the exit code: 0, or 1 if the claim does not hold. Raises UserError.
    """
    args = parse_arguments(argv)
    return args.function(args)


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns the exit code: that of run, or of an error."""
    return run_as_program(run, sys.argv[1:] if argv is None else argv)
