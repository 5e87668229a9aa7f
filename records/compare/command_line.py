"""Read run logs of the GPT-2 speedrun, judge a claim, show the difference.

    python records/compare.py table records/                                   # the entries' claims; --all: all runs
    python records/compare.py verify records/NEW --baseline records/OLD        # does the claim hold? exit code 0 or 1
    python records/compare.py diff records/OLD records/NEW                     # code, hyperparameters, results
    python records/compare.py plot records/OLD records/NEW -o curves.svg       # loss against steps, tokens and time
    python records/compare.py report records/OLD records/NEW -o report.html    # all of it as a page; or of an entry
    python records/compare.py extract LOG -o train_gpt.py                      # the script that a log embeds
    python records/compare.py runs-needed --sd 0.0013 --margin 0.001           # how many runs a claim needs
    python records/compare.py ab OLD.py NEW.py --runs 5 -- --track laptop      # runs two scripts in turn, then verifies

PATH is a log, a folder (searched recursively for .txt and .log) or a glob. Logs of this project and the public ones are
read: source, a line of 100 '=', versions, the line again, metrics; or with any of the first parts missing. What a log
does not tell is null. Exit code 2 where nothing can be read.
"""
import argparse
import sys

from .ab import ab
from .difference import diff, extract
from .logs import TARGET, UserError
from .page import report
from .plots import plot
from .statistics import runs_needed
from .table import table
from .verdict import verify


def print_runs_needed(args) -> int:
    """How many runs a claim needs."""
    for name in ("sd", "margin"):
        if getattr(args, name) <= 0:
            raise UserError(f"--{name} is {getattr(args, name)}, expected more than 0")
    if not 0 < args.p < 0.5:
        raise UserError(f"--p is {args.p}, expected between 0 and 0.5")
    print(f"{runs_needed(args.sd, args.margin, args.p)} runs give p <= {args.p:g} where they come out as told: a mean "
          f"{args.margin:g} below the target, a standard deviation of {args.sd:g}")
    print(f"{runs_needed(args.sd, args.margin, args.p, 0.8)} runs give it with a chance of 80%")
    return 0


class Parser(argparse.ArgumentParser):
    """Without argparse's usage before the one line that matters."""

    def error(self, message):
        raise UserError(f"{message}; python records/compare.py --help shows the commands")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Raises UserError."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)

    def command(name, function, help):
        added = commands.add_parser(name, help=help, description=function.__doc__)
        added.set_defaults(function=function)
        return added

    def judging(added):
        added.add_argument("--target", type=float, help=f"loss to reach (the log's own track's, else {TARGET})")
        added.add_argument("--p", type=float, default=0.01, help="what p-values must lie below (%(default)s)")
        added.add_argument("--systems-only", action="store_true",
                           help="only the speed of the same mathematics changed: the loss must not get worse")

    added = command("table", table, "the entries' claims, a line each; of other logs a row per group")
    added.add_argument("paths", nargs="+", metavar="PATH")
    added.add_argument("--all", action="store_true", help="all groups of comparable runs, all columns, all notes")
    added.add_argument("--target", type=float, help=f"loss to test against (the log's own track's, else {TARGET})")
    form = added.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="as a pull request wants it")
    form.add_argument("--json", action="store_true", help="all groups as a list of objects")
    added = command("verify", verify, "apply the rules to a claim; exit code 0 or 1")
    added.add_argument("candidate", nargs="+", metavar="CANDIDATE", help="logs, or folders: the logs directly in them")
    added.add_argument("--baseline", nargs="+", metavar="OLD", help="likewise (CANDIDATE's folder baseline/)")
    judging(added)
    added = command("diff", diff, "what differs: code, hyperparameters, environment, results")
    added.add_argument("a", metavar="A")
    added.add_argument("b", metavar="B")
    added = command("plot", plot, "validation loss against steps, tokens and training time")
    added.add_argument("paths", nargs="+", metavar="PATH")
    added.add_argument("-o", "--out", required=True, help=".svg or .png to write")
    added.add_argument("--target", type=float)
    added = command("report", report, "all about logs, or about B against A, as one HTML page")
    added.add_argument("paths", nargs="+", metavar="PATH",
                       help="an entry's folder; or A, the baseline, and B: logs, folders, globs; or more of them")
    added.add_argument("-o", "--out", default="report.html", help=".html to write (%(default)s)")
    judging(added)
    added = command("extract", extract, "write the embedded script")
    added.add_argument("log", metavar="LOG")
    added.add_argument("-o", "--out", required=True)
    added = command("runs-needed", print_runs_needed, "how many runs a claim needs")
    added.add_argument("--sd", type=float, required=True, help="standard deviation of the final loss")
    added.add_argument("--margin", type=float, required=True, help="how far the mean lies below the target")
    added.add_argument("--p", type=float, default=0.01)
    added = command("ab", ab, "run two scripts in turn, A B A B ..., then verify B against A")
    added.add_argument("a", metavar="A", help="the baseline's script")
    added.add_argument("b", metavar="B", help="the candidate's; what follows -- goes to both: -- --track laptop")
    added.add_argument("--runs", type=int, required=True, help="of each script; seeds 0, 1, ...")
    added.add_argument("--fresh", action="store_true", help="keep no run that is there already")
    judging(added)
    end = argv.index("--") if "--" in argv else len(argv)
    args, rest = parser.parse_args(argv[:end]), argv[end + 1:]
    if rest and args.command != "ab":
        raise UserError(f"unexpected arguments after --: {' '.join(rest)}")
    args.args = rest
    return args


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    try:
        args = parse_arguments(sys.argv[1:] if argv is None else argv)
        return args.function(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # | head
        return 0
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
