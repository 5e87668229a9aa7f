"""Reads logs of GPT-2 speedrun runs, judges claims and shows differences.

    python -m tools.compare table records/                             # one row for each entry's claim
    python -m tools.compare verify NEW --baseline OLD                  # does the claim hold? exit code 0 or 1
    python -m tools.compare diff OLD NEW                               # what differs: code, settings, results
    python -m tools.compare plot OLD NEW -o curves.svg                 # loss against steps, tokens and time
    python -m tools.compare report OLD NEW -o report.html              # everything on one page
    python -m tools.compare extract LOG -o train_gpt.py                # the script that a log embeds
    python -m tools.compare runs-needed --sd 0.0013 --margin 0.001     # how many runs a claim needs
    python -m tools.compare ab OLD.py NEW.py --runs 5 -- --track laptop   # run two scripts alternately

PATH, OLD and NEW are logs, folders (searched for .txt and .log files) or globs. Logs of this project and of
modded-nanogpt are read: source code, a line of 100 '=', versions, the line again, metrics; the first parts may
be missing. Exit code 2 means that the arguments or files are wrong.
"""
import argparse
import sys

from .ab import ab
from .difference import diff, extract
from .logs import TARGET, UserError
from .page import report
from .plots import plot
from .stats import runs_needed
from .table import table
from .verdict import verify


def print_runs_needed(args) -> int:
    """Prints how many runs a claim needs."""
    for name, value in (("sd", args.sd), ("margin", args.margin)):
        if value <= 0:
            raise UserError(f"--{name} is {value}, expected more than 0")
    if not 0 < args.p < 0.5:
        raise UserError(f"--p is {args.p}, expected between 0 and 0.5")
    exact = runs_needed(args.sd, args.margin, args.p)
    probable = runs_needed(args.sd, args.margin, args.p, power=0.8)
    print(f"{exact} runs give p <= {args.p:g} if their mean lies exactly {args.margin:g} below the target "
          f"and their standard deviation is {args.sd:g}")
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

    def command(name, function, help):
        added = commands.add_parser(name, help=help, description=function.__doc__)
        added.set_defaults(function=function)
        return added

    def add_paths(added, help=None):
        added.add_argument("paths", nargs="+", metavar="PATH", help=help)

    def add_target(added):
        added.add_argument("--target", type=float,
                           help=f"loss to reach in nats (default: the log's own, else {TARGET})")

    def add_rules(added):
        add_target(added)
        added.add_argument("--p", type=float, default=0.01,
                           help="the tests' p-values must lie below this (default %(default)s)")
        added.add_argument("--systems-only", action="store_true",
                           help="the mathematics is the same and only faster: the loss must not get worse")

    added = command("table", table, "one row for each entry's claim, or for each group of runs")
    add_paths(added)
    added.add_argument("--all", action="store_true", help="all groups of comparable runs, all columns, all notes")
    add_target(added)
    form = added.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="a table for a pull request")
    form.add_argument("--json", action="store_true", help="all groups as a list of objects")

    added = command("verify", verify, "apply the rules to a claim; exit code 0 or 1")
    added.add_argument("candidate", nargs="+", metavar="CANDIDATE", help="logs, or a folder with logs directly in it")
    added.add_argument("--baseline", nargs="+", metavar="OLD", help="likewise (default: baseline/ beside CANDIDATE's logs)")
    add_rules(added)

    added = command("diff", diff, "what differs: code, hyperparameters, environment, results")
    added.add_argument("a", metavar="A")
    added.add_argument("b", metavar="B")

    added = command("plot", plot, "validation loss against steps, tokens and training time")
    add_paths(added)
    added.add_argument("-o", "--out", required=True, help=".svg, .png or .pdf to write")
    add_target(added)

    added = command("report", report, "everything about logs, or about B against A, as one HTML page")
    add_paths(added, help="an entry's folder; or A, the baseline, and B; or any other logs")
    added.add_argument("-o", "--out", default="report.html", help=".html to write (default %(default)s)")
    add_rules(added)

    added = command("extract", extract, "write the script that a log embeds")
    added.add_argument("log", metavar="LOG")
    added.add_argument("-o", "--out", required=True)

    added = command("runs-needed", print_runs_needed, "how many runs a claim needs")
    added.add_argument("--sd", type=float, required=True, help="standard deviation of the final loss")
    added.add_argument("--margin", type=float, required=True, help="how far the mean lies below the target")
    added.add_argument("--p", type=float, default=0.01)

    added = command("ab", ab, "run two scripts alternately, A B A B ..., then verify B against A")
    added.add_argument("a", metavar="A", help="the baseline's script")
    added.add_argument("b", metavar="B", help="the candidate's script; both get what follows --")
    added.add_argument("--runs", type=int, required=True, help="runs of each script, with seeds 0, 1, ...")
    added.add_argument("--fresh", action="store_true", help="repeat runs that are complete")
    add_rules(added)
    return parser


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The arguments; what follows -- is args.args, the flags of both scripts. Raises UserError."""
    end = argv.index("--") if "--" in argv else len(argv)
    args = make_parser().parse_args(argv[:end])
    args.args = argv[end + 1:]
    if args.args and args.command != "ab":
        raise UserError(f"unexpected arguments after --: {' '.join(args.args)}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0, 1 (a claim does not hold), 2 (a mistake) or 130 (Ctrl-C)."""
    try:
        args = parse_arguments(sys.argv[1:] if argv is None else argv)
        return args.function(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # as in `table records/ | head`
        return 0
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues where it stopped", file=sys.stderr)
        return 130
