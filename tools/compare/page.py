"""Page: everything about a comparison in one HTML file, which needs no network.

Logs may come from strangers. Jinja2 escapes every text, invisible characters are shown as their
codes, and a content security policy allows only the page's own script and style. So no text of a
log can run or load anything.
"""
import base64
import hashlib
import io
import itertools
import json
import os
import shlex
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from data import UserError

from .difference import code_diff, code_lines, differing, facts_of
from .groups import Group, by_seed, claims_of, group_runs, labels_of, same_seed
from .logs import find_runs, why_incomplete
from .plots import draw
from .stats import difference
from .table import cells_of, columns_of, notes_on, row_of
from .text import seconds, shortened, visible
from .verdict import judge, several_groups

HERE = Path(__file__).parent
# What is shown at most.
MAX_PLOTTED = 12         # groups with curves
MAX_COLUMNS = 8          # groups in the table of settings
MAX_DIFFS = 4            # pairs of scripts
MAX_DIFF_LINES = 10_000
MAX_NOTES = 200
MAX_CHARACTERS = 1_000   # of a value, a note or a line of code


@dataclass
class Subject:
    """The groups that a page is about."""
    main: list[Group]          # if there are two sides: the baseline, then the candidate
    two_sides: bool = False
    no_verdict: str = ""       # why two paths are no two sides
    others: list[Group] = field(default_factory=list)   # an entry's further runs, such as ablations
    remarks: list[str] = field(default_factory=list)


class Table(NamedTuple):
    """A table that the page can sort by each column."""
    columns: list[str]
    rows: list[list[str]]


def subject_of(paths: list[str]) -> Subject:
    """What the logs below the paths are about. Raises UserError if they hold no run."""
    if len(paths) == 1 and os.path.isdir(paths[0]):
        return subject_of_folder(paths[0])
    found = [find_runs([path], direct=True) for path in paths]
    remarks = [remark for _, remarks in found for remark in remarks]
    if len(paths) != 2:
        runs = [run for runs, _ in found for run in runs]
        groups = group_runs(runs)
        groups.sort(key=lambda group: runs[0] not in group.runs + group.incomplete)
        return Subject(groups, two_sides=len(groups) == 2, remarks=remarks)
    old, new = [group_runs(runs) for runs, _ in found]
    for groups, side in ((old, "baseline"), (new, "candidate")):
        if len(groups) > 1:
            return Subject(old + new, no_verdict=several_groups(groups, side), remarks=remarks)
    return Subject(old + new, two_sides=True, remarks=remarks)


def subject_of_folder(path: str) -> Subject:
    """An entry: the logs directly in its folder against those in its baseline/, and the others."""
    runs, remarks = find_runs([path])
    by_folder = {}
    for run in runs:
        folder = os.path.relpath(os.path.dirname(run.path) or ".", path)
        by_folder.setdefault(folder, []).append(run)
    groups = {folder: group_runs(by_folder[folder]) for folder in sorted(by_folder)}
    everything = list(itertools.chain(*groups.values()))
    own = groups.get(".", [])
    baseline = groups.get("baseline", [])
    two_sides = len(own) == len(baseline) == 1
    main = baseline + own if two_sides else own or claims_of(everything) or everything
    chosen = {id(group) for group in main}
    others = [group for group in everything if id(group) not in chosen]
    return Subject(main, two_sides, others=others, remarks=remarks)


def report(args) -> int:
    """Writes a page about logs: verdict, results, curves, settings, runs and code.

    Of two paths, the first is the baseline and the second the candidate. Of an entry's folder, the
    logs in its baseline/ are the baseline.
    """
    if Path(args.out).suffix not in (".html", ".htm"):
        raise UserError(f"-o is {args.out}, expected a name that ends in .html")
    Path(args.out).write_text(page_of(subject_of(args.paths), args), encoding="utf-8")
    print(visible(args.out))
    return 0


def page_of(subject: Subject, args) -> str:
    """The HTML page. args: paths, out, target, p, systems_only."""
    import jinja2
    from markupsafe import Markup

    def shown(value):
        return value if isinstance(value, Markup) else visible(str(value))

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, finalize=shown,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    script = (HERE / "page.js").read_text("utf-8")
    style = (HERE / "page.css").read_text("utf-8")
    policy = (f"default-src 'none'; img-src data:; script-src 'sha256-{digest(script)}'; "
              f"style-src 'sha256-{digest(style)}'; base-uri 'none'; form-action 'none'")
    command = shlex.join(["python", "-m", "tools.compare", "report", *args.paths, "-o", args.out])
    groups = subject.main + subject.others
    labels = names_of(groups)
    notes = notes_on(groups) + subject.remarks
    return environment.get_template("page.html").render(
        policy=policy,
        style=Markup(style),
        script=Markup(script),
        labels=labels[:len(subject.main)],
        judgement=judge(*reversed(subject.main), args) if subject.two_sides else None,
        no_verdict=subject.no_verdict,
        results=group_table(subject.main, labels, args),
        others=group_table(subject.others, labels[len(subject.main):], args, subject.main),
        notes=[shortened(note, MAX_CHARACTERS) for note in notes[:MAX_NOTES]],
        number_of_notes=len(notes),
        curves=curves_image(subject.main[:MAX_PLOTTED], labels, args.target),
        settings=settings_of(subject.main[:MAX_COLUMNS], labels),
        runs=run_table(groups, labels),
        links=[link_to(run.path, args.out) for group in groups
               for run in group.runs + group.incomplete],
        diffs=diffs_of(subject.main, labels),
        footer=f"{time.strftime('%Y-%m-%d %H:%M')}, {shortened(command, 2_000)}")


def digest(text: str) -> str:
    """The SHA-256 of a script or style, as a content security policy writes it."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def link_to(path: str, out: str) -> str:
    """A link from the page, out, to a file."""
    relative = os.path.relpath(path, os.path.dirname(os.path.abspath(out)))
    return "./" + quote(os.fsencode(relative))


def names_of(groups: list[Group]) -> list[str]:
    """Labels; two groups of the same runs are distinguished by the place of their logs."""
    labels = labels_of(groups)
    counts = Counter(labels)
    return [f"{label} ({group.path})" if counts[label] > 1 else label
            for group, label in zip(groups, labels, strict=True)]


def group_table(groups: list[Group], labels: list[str], args, main: list[Group] = ()) -> Table:
    """A row for each group.

    If the page's main groups are given, each loss is compared with that of the main group that ran
    the same script.
    """
    rows = [cells_of(row_of(group, label, args.target))
            for group, label in zip(groups, labels, strict=False)]
    for group, row in zip(groups, rows, strict=True):
        code = group.any.code_hash
        same = [other for other in main if other.runs and other.any.code_hash == code]
        if main:
            row["difference"] = row["p of difference"] = ""
        if same and group.runs:
            apart, p, _ = difference(by_seed(group.losses, group.runs),
                                     by_seed(same[-1].losses, same[-1].runs))
            row["difference"] = f"{apart:+.4f}"
            row["p of difference"] = "" if p is None else f"{p:.2g}"
    columns = [name for name in columns_of(rows) if name != "torch"]  # the settings show it
    return Table(columns, [[row[name] for name in columns] for row in rows])


def curves_image(groups: list[Group], labels: list[str], target: float | None) -> str:
    """The curves as a data URL; in an image no script can run."""
    file = io.BytesIO()
    draw(groups, labels, target).savefig(file, format="svg")
    return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"


def settings_of(groups: list[Group], labels: list[str]) -> Table:
    """The settings and facts of the environment that differ between groups; all for one group."""
    runs = same_seed(*groups) if len(groups) == 2 else [group.typical for group in groups]
    facts = [facts_of(run) for run in runs]
    values = {name: [value] for name, value in sorted(facts[0].items())}
    if len(facts) > 1:
        values = differing(facts)
    rows = []
    for name, found in values.items():
        if name not in ("--seed", "--entry"):
            texts = [text_of(value) for value in (name, *found)]
            rows.append([shortened(text, MAX_CHARACTERS) for text in texts])
    return Table(["setting", *labels[:len(groups)]], rows)


def text_of(value) -> str:
    """A setting as text; empty for None, which means that the log does not name it."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def run_table(groups: list[Group], labels: list[str]) -> Table:
    """A row for each run; the log is the last column."""
    rows = []
    for group, label in zip(groups, labels, strict=True):
        for run in group.runs + group.incomplete:
            seed = str(run.hyperparameters.get("seed", ""))
            loss = why_incomplete(run) if run.val_loss is None else f"{run.val_loss:.4f}"
            step = "" if run.step_avg_ms is None else f"{run.step_avg_ms:.2f} ms"
            rows.append([label, shortened(seed, MAX_CHARACTERS), loss,
                         seconds(run.train_time_ms, 2), step, str(run.last_step),
                         os.path.basename(run.path)])
    columns = ["group", "seed", "final val loss", "training time", "step", "last step", "log"]
    return Table(columns, rows)


def diffs_of(groups: list[Group], labels: list[str]) -> list[dict]:
    """The differences between neighbouring scripts: two labels and the lines of a diff for each."""
    scripts = {}
    for group, label in zip(groups, labels, strict=False):
        if group.any.code_span:
            scripts.setdefault(group.any.code_hash, (group, label))
    found = []
    shown = list(scripts.values())[:MAX_DIFFS + 1]
    for (old, old_label), (new, new_label) in itertools.pairwise(shown):
        a, b = same_seed(old, new)
        lines = code_diff(code_lines(a), code_lines(b))[:MAX_DIFF_LINES]
        found.append({"old": old_label, "new": new_label,
                      "lines": [shortened(line, MAX_CHARACTERS) for line in lines]})
    return found
