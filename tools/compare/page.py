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

from .difference import code_diff, code_lines, differing, facts_of
from .groups import Group, by_seed, claims_of, group_runs, labels_of, same_seed
from .logs import Run, UserError, find_runs, why_incomplete
from .plots import draw
from .stats import difference
from .table import cells_of, columns_of, notes_on, row_of
from .text import count, finite, seconds, shortened, visible
from .verdict import Judgement, judge, only_group

HERE = Path(__file__).parent
# What is shown at most.
MAX_PLOTTED = 12         # groups with curves
MAX_COLUMNS = 8          # groups in the table of settings
MAX_DIFFS = 4            # pairs of scripts
MAX_DIFF_LINES = 10_000
MAX_NOTES = 200
MAX_CHARACTERS = 1_000   # of a cell, a note or a line of code
# Columns of the results that are sorted by a value of row_of instead of their text.
SORTED_BY = {"runs": "runs", "steps": "steps", "val loss": "val_loss_mean", "target": "target",
             "p": "p_value", "training time": "train_time_ms_mean", "step": "step_avg_ms",
             "met by": "reached", "to target": "train_time_ms_to_target",
             "tokens to target": "tokens_to_target"}


class Cell(NamedTuple):
    """A cell of a table."""
    text: str
    value: float | None = None  # sorts the column, instead of the text
    href: str = ""


class Table(NamedTuple):
    """A table that the page can sort by each column."""
    columns: list[str]
    rows: list[list[Cell]]


@dataclass
class Subject:
    """The groups that a page is about."""
    main: list[Group]          # if there are two sides: the baseline, then the candidate
    two_sides: bool = False
    no_verdict: str = ""       # why two paths are no two sides
    others: list[Group] = field(default_factory=list)   # an entry's further runs, such as ablations
    remarks: list[str] = field(default_factory=list)


def subject_of(paths: list[str]) -> Subject:
    """What the logs below the paths are about. Raises UserError if they hold no run."""
    if len(paths) == 1 and os.path.isdir(paths[0]):
        return subject_of_folder(paths[0])
    if len(paths) == 2:
        old_runs, old_remarks = find_runs(paths[:1], direct=True)
        new_runs, new_remarks = find_runs(paths[1:], direct=True)
        old = group_runs(old_runs)
        new = group_runs(new_runs)
        remarks = old_remarks + new_remarks
        try:
            main = [only_group(old, "baseline"), only_group(new, "candidate")]
        except UserError as error:
            return Subject(old + new, no_verdict=str(error), remarks=remarks)
        return Subject(main, two_sides=True, remarks=remarks)
    runs, remarks = find_runs(paths, direct=True)
    order = {id(run): number for number, run in enumerate(runs)}
    groups = group_runs(runs)
    groups.sort(key=lambda group: min(order[id(run)] for run in group.runs + group.incomplete))
    return Subject(groups, two_sides=len(groups) == 2, remarks=remarks)


def subject_of_folder(path: str) -> Subject:
    """An entry: the logs directly in its folder against those in its baseline/, and the others."""
    runs, remarks = find_runs([path])
    by_folder: dict[str, list[Run]] = {}
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
    print(args.out)
    return 0


def page_of(subject: Subject, args) -> str:
    """The HTML page. args: paths, out, target, p, systems_only."""
    import jinja2
    from markupsafe import Markup

    def shown(value):
        return value if isinstance(value, Markup) else visible(str(value))

    groups = subject.main + subject.others
    labels = names_of(groups)
    main_labels = labels[:len(subject.main)]
    judgement = judge(*reversed(subject.main), args) if subject.two_sides else None
    notes = notes_on(groups) + subject.remarks
    script = (HERE / "page.js").read_text()
    style = (HERE / "page.css").read_text()
    policy = (f"default-src 'none'; img-src data:; script-src 'sha256-{digest(script)}'; "
              f"style-src 'sha256-{digest(style)}'; base-uri 'none'; form-action 'none'")
    command = shlex.join(["python", "-m", "tools.compare", "report", *args.paths, "-o", args.out])
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, finalize=shown,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("page.html").render(
        policy=policy,
        style=Markup(style),
        script=Markup(script),
        title=title_of(subject, main_labels, args.paths),
        labels=main_labels,
        judgement=judgement,
        conclusion=conclusion_of(judgement),
        no_verdict=subject.no_verdict,
        results=group_table(subject.main, main_labels, args),
        notes=[shortened(note, MAX_CHARACTERS) for note in notes[:MAX_NOTES]],
        number_of_notes=len(notes),
        curves=curves_image(subject.main[:MAX_PLOTTED], main_labels[:MAX_PLOTTED], args.target),
        settings=settings_of(subject.main[:MAX_COLUMNS], main_labels[:MAX_COLUMNS]),
        others=group_table(subject.others, labels[len(subject.main):], args, subject.main),
        runs=run_table(groups, labels, args.out),
        diffs=diffs_of(subject.main, main_labels),
        footer=f"{time.strftime('%Y-%m-%d %H:%M')}, {shortened(command, 2_000)}")


def digest(text: str) -> str:
    """The SHA-256 of a script or style, as a content security policy writes it."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def names_of(groups: list[Group]) -> list[str]:
    """Labels; two groups of the same runs are distinguished by the place of their logs."""
    labels = labels_of(groups)
    counts = Counter(labels)
    return [f"{label} ({group.path})" if counts[label] > 1 else label
            for group, label in zip(groups, labels, strict=True)]


def title_of(subject: Subject, labels: list[str], paths: list[str]) -> str:
    """The page's heading."""
    if subject.two_sides:
        return f"{labels[1]} against {labels[0]}"
    if len(paths) == 1 and os.path.isdir(paths[0]):
        return os.path.basename(os.path.abspath(paths[0]))
    if len(labels) == 1:
        return labels[0]
    return f"{labels[0]} and {count(len(labels) - 1, 'other group')}"


def conclusion_of(judgement: Judgement | None) -> str:
    """The verdict in one sentence; empty without a judgement."""
    if judgement is None:
        return ""
    if min(len(judgement.new.runs), len(judgement.old.runs)) < 2:
        return "No claim yet: a test needs at least 2 complete runs of each side."
    return f"{judgement.conclusion[0].upper()}{judgement.conclusion[1:]}."


def group_table(groups: list[Group], labels: list[str], args, main: list[Group] | None = None) -> Table:
    """A row for each group.

    If the page's main groups are given, the loss of each other group is compared with that of the
    main group that ran the same script.
    """
    if not groups:
        return Table([], [])
    rows = [row_of(group, label, args.target) for group, label in zip(groups, labels, strict=True)]
    texts = [cells_of(row) for row in rows]
    columns = [name for name in columns_of(texts) if name != "torch"]  # the settings show it
    table = []
    for group, row, cells in zip(groups, rows, texts, strict=True):
        line = [Cell(cells[name], row.get(SORTED_BY.get(name))) for name in columns]
        table.append(line + (difference_cells(group, main) if main else []))
    return Table(columns + ["difference", "p of difference"] if main else columns, table)


def difference_cells(group: Group, main: list[Group]) -> list[Cell]:
    """The difference between the mean final losses of a group and of the main group with its script,
    and its p-value; two empty cells if there is none.
    """
    same = [other for other in main if other.runs and other.any.code_hash == group.any.code_hash]
    if not group.runs or not same:
        return [Cell(""), Cell("")]
    reference = same[-1]
    apart, p, _ = difference(by_seed(group.losses, group.runs),
                             by_seed(reference.losses, reference.runs))
    return [Cell(f"{apart:+.4f}", finite(apart)), Cell("" if p is None else f"{p:.2g}", p)]


def curves_image(groups: list[Group], labels: list[str], target: float | None) -> str:
    """The curves as a data URL; in an image no script can run."""
    file = io.BytesIO()
    draw(groups, labels, target).savefig(file, format="svg")
    return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"


def settings_of(groups: list[Group], labels: list[str]) -> Table:
    """The settings and facts of the environment that differ between groups; all for one group."""
    runs = same_seed(*groups) if len(groups) == 2 else [group.typical for group in groups]
    facts = [{name: value for name, value in facts_of(run).items() if name not in ("--seed", "--entry")}
             for run in runs]
    if len(facts) == 1:
        values = {name: [value] for name, value in sorted(facts[0].items())}
    else:
        values = differing(facts)
    rows = []
    for name, found in values.items():
        texts = [value if isinstance(value, str) else json.dumps(value) for value in found]
        rows.append([Cell(shortened(text, MAX_CHARACTERS)) for text in (name, *texts)])
    return Table(["setting", *labels], rows)


def run_table(groups: list[Group], labels: list[str], out: str) -> Table:
    """A row for each run, with a link from the page, out, to its log."""
    folder = os.path.dirname(os.path.abspath(out))
    rows = []
    for group, label in zip(groups, labels, strict=True):
        for run in group.runs + group.incomplete:
            seed = run.hyperparameters.get("seed", "")
            loss = why_incomplete(run) if run.val_loss is None else f"{run.val_loss:.4f}"
            step = "" if run.step_avg_ms is None else f"{run.step_avg_ms:.2f} ms"
            relative = os.path.relpath(run.path, folder)
            rows.append([Cell(label),
                         Cell(shortened(str(seed), MAX_CHARACTERS)),
                         Cell(loss, finite(run.val_loss)),
                         Cell(seconds(run.train_time_ms, 2), run.train_time_ms),
                         Cell(step, run.step_avg_ms),
                         Cell(str(run.last_step), run.last_step),
                         Cell(os.path.basename(run.path), href="./" + quote(os.fsencode(relative)))])
    columns = ["group", "seed", "final val loss", "training time", "step", "last step", "log"]
    return Table(columns, rows)


def diffs_of(groups: list[Group], labels: list[str]) -> list[dict]:
    """The differences between neighbouring scripts: two labels and the lines of a diff for each."""
    scripts: dict[str, tuple[Group, str]] = {}
    for group, label in zip(groups, labels, strict=True):
        if group.any.code_span:
            scripts.setdefault(group.any.code_hash, (group, label))
    found = []
    for (old, old_label), (new, new_label) in list(itertools.pairwise(scripts.values()))[:MAX_DIFFS]:
        a, b = same_seed(old, new)
        lines = code_diff(code_lines(a), code_lines(b))[:MAX_DIFF_LINES]
        found.append({"old": old_label, "new": new_label,
                      "lines": [shortened(line, MAX_CHARACTERS) for line in lines]})
    return found
