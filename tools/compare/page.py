"""Page: everything about a comparison in one HTML file, which needs no network.

Logs may come from strangers. Jinja2 escapes every text, invisible characters are shown as their codes, and a content
security policy allows only the page's own script and style, so that no text of a log can run or load anything.
"""
import base64
import csv
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
MAX_PLOTTED = 12        # groups with curves
MAX_COLUMNS = 8         # groups in the table of settings
MAX_DIFFS = 4           # pairs of scripts
MAX_DIFF_LINES = 10_000
MAX_CELL = 1_000        # characters of a cell or of a line of code
MAX_TSV_ROWS = 5_000
# Columns of the results that are sorted by a value of row_of, not by their text.
SORTED_BY = {"runs": "runs", "steps": "steps", "val loss": "val_loss_mean", "target": "target", "p": "p_value",
             "training time": "train_time_ms_mean", "step": "step_avg_ms", "met by": "reached",
             "to target": "train_time_ms_to_target", "tokens to target": "tokens_to_target"}


class Cell(NamedTuple):
    """A cell of a table."""
    text: str
    value: float | None = None  # by which the column is sorted, instead of by the text
    href: str = ""


class Table(NamedTuple):
    """A table that the page can sort by each column."""
    columns: list[str]
    rows: list[list[Cell]]


@dataclass
class Subject:
    """The groups that a page is about."""
    main: list[Group]                              # if there are two sides: the baseline, then the candidate
    two_sides: bool = False
    no_verdict: str = ""                           # why two paths are no two sides
    folders: dict[str, list[Group]] = field(default_factory=dict)   # subfolders of an entry
    remarks: list[str] = field(default_factory=list)

    @property
    def groups(self) -> list[Group]:
        """All groups: main, then those of the subfolders."""
        return [*self.main, *itertools.chain(*self.folders.values())]


def subject_of(paths: list[str]) -> Subject:
    """What the logs below the paths are about. Raises UserError if they hold no run."""
    if len(paths) == 1 and os.path.isdir(paths[0]):
        return subject_of_folder(paths[0])
    if len(paths) == 2:
        found = [find_runs([path], direct=True) for path in paths]
        old, new = (group_runs(runs) for runs, _ in found)
        remarks = found[0][1] + found[1][1]
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
    """An entry: the logs in its folder against those in its baseline/; the other subfolders apart."""
    runs, remarks = find_runs([path])
    by_folder: dict[str, list[Run]] = {}
    for run in runs:
        folder = os.path.relpath(os.path.dirname(run.path) or ".", path)
        by_folder.setdefault(folder, []).append(run)
    for item in Path(path).iterdir():
        if item.is_dir() and any(item.glob("*.tsv")):  # trials that are listed, without their logs
            by_folder.setdefault(item.name, [])
    folders = {folder: group_runs(by_folder[folder]) for folder in sorted(by_folder)}
    main = folders.pop(".", [])
    if len(main) == 1 and len(folders.get("baseline", [])) == 1:
        return Subject([*folders.pop("baseline"), *main], True, folders=folders, remarks=remarks)
    if not main:
        everything = list(itertools.chain(*folders.values()))
        main = claims_of(everything) or everything
        chosen = {id(group) for group in main}
        for folder, groups in list(folders.items()):
            folders[folder] = [group for group in groups if id(group) not in chosen]
            if groups and not folders[folder]:
                del folders[folder]
    return Subject(main, two_sides=len(main) == 2 and not folders, folders=folders, remarks=remarks)


def report(args) -> int:
    """Writes a page about logs: verdict, results, curves, settings, runs and code. Of two paths, the
    first is the baseline and the second the candidate; of an entry's folder, its baseline/ is the
    baseline, and its other subfolders get sections of their own.
    """
    if Path(args.out).suffix not in (".html", ".htm"):
        raise UserError(f"-o is {args.out}, expected a name that ends in .html")
    Path(args.out).write_text(page_of(subject_of(args.paths), args), encoding="utf-8")
    print(args.out)
    return 0


def page_of(subject: Subject, args) -> str:
    """The HTML page. args: paths, out, target, p, systems_only."""
    import jinja2

    def shown(value):
        return value if isinstance(value, jinja2.utils.markupsafe.Markup) else visible(str(value))

    labels = names_of(subject.groups)
    main_labels = labels[:len(subject.main)]
    judgement = None
    if subject.two_sides:
        old, new = subject.main
        judgement = judge(new, old, args)
    notes = notes_on(subject.groups) + subject.remarks
    script = (HERE / "page.js").read_text()
    style = (HERE / "page.css").read_text()
    command = shlex.join(["python", "-m", "tools.compare", "report", *args.paths, "-o", args.out])
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE), autoescape=True, finalize=shown,
                                     undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("page.html").render(
        title=title_of(subject, main_labels, args.paths),
        policy=f"default-src 'none'; img-src data:; script-src 'sha256-{digest(script)}'; "
               f"style-src 'sha256-{digest(style)}'; base-uri 'none'; form-action 'none'",
        style=style,
        script=script,
        labels=main_labels,
        conclusion=conclusion_of(judgement),
        judgement=judgement,
        no_verdict=subject.no_verdict,
        results=group_table(subject.main, main_labels, args),
        notes=[shortened(note, MAX_CELL) for note in notes[:200]],
        number_of_notes=len(notes),
        curves=curves_image(subject.main[:MAX_PLOTTED], main_labels, args.target),
        settings=settings_of(subject.main[:MAX_COLUMNS], main_labels),
        folders=folders_of(subject, labels, args),
        runs=run_table(subject, labels, args.out),
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
    return labels[0] if len(labels) == 1 else f"{labels[0]} and {count(len(labels) - 1, 'other group')}"


def conclusion_of(judgement: Judgement | None) -> str:
    """The verdict in one sentence; empty without a judgement."""
    if judgement is None:
        return ""
    if min(len(judgement.new.runs), len(judgement.old.runs)) < 2:
        return "No claim yet: a test needs at least 2 complete runs of each side."
    return f"{judgement.conclusion[0].upper()}{judgement.conclusion[1:]}."


def group_table(groups: list[Group], labels: list[str], args, reference: Group | None = None) -> Table:
    """A row for each group. If there is a reference group, its loss is compared with each other loss."""
    rows = [row_of(group, label, args.target) for group, label in zip(groups, labels, strict=True)]
    texts = [cells_of(row) for row in rows]
    columns = [name for name in columns_of(texts) if name != "torch"]  # the settings show it
    table = []
    for group, row, cells in zip(groups, rows, texts, strict=True):
        line = [Cell(cells[name], row.get(SORTED_BY.get(name))) for name in columns]
        if reference is not None:
            line += difference_cells(group, reference)
        table.append(line)
    return Table(columns + ["difference", "p of difference"] * (reference is not None), table)


def difference_cells(group: Group, reference: Group) -> list[Cell]:
    """The difference of the mean final losses of two groups, and its p-value."""
    if not group.runs:
        return [Cell(""), Cell("")]
    apart, p, _ = difference(by_seed(group.losses, group.runs), by_seed(reference.losses, reference.runs))
    return [Cell(f"{apart:+.4f}", finite(apart)), Cell("" if p is None else f"{p:.2g}", p)]


def curves_image(groups: list[Group], labels: list[str], target: float | None) -> str:
    """The curves as the address of an image that holds its own data; an image can't run a script."""
    figure = draw(groups, labels[:len(groups)], target, columns=2, pace=True)
    file = io.BytesIO()
    figure.savefig(file, format="svg")
    return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"


def settings_of(groups: list[Group], labels: list[str]) -> Table:
    """The settings and facts of the environment that differ between groups; all of them for one group."""
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
        rows.append([Cell(shortened(text, MAX_CELL)) for text in (name, *texts)])
    return Table(["setting", *labels[:len(groups)]], rows)


def run_table(subject: Subject, labels: list[str], out: str) -> Table:
    """A row for each run, with a link to its log."""
    rows = []
    for group, label in zip(subject.groups, labels, strict=True):
        for run in group.runs + group.incomplete:
            seed = run.hyperparameters.get("seed")
            loss = why_incomplete(run) if run.val_loss is None else f"{run.val_loss:.4f}"
            step = "" if run.step_avg_ms is None else f"{run.step_avg_ms:.2f} ms"
            rows.append([Cell(label), Cell("" if seed is None else shortened(str(seed), MAX_CELL)),
                         Cell(loss, finite(run.val_loss)), Cell(seconds(run.train_time_ms, 2), run.train_time_ms),
                         Cell(step, run.step_avg_ms), Cell(str(run.last_step), run.last_step),
                         Cell(os.path.basename(run.path), href=link_to(run.path, out))])
    columns = ["group", "seed", "final val loss", "training time", "step", "last step", "log"]
    return Table(columns, rows)


def link_to(path: str, out: str) -> str:
    """A link from the page, out, to a file."""
    relative = os.path.relpath(path, os.path.dirname(os.path.abspath(out)))
    return "./" + quote(os.fsencode(relative))


def folders_of(subject: Subject, labels: list[str], args) -> list[dict]:
    """For each subfolder of an entry: its name, its table of groups, and the tables that lie in it.

    The losses are compared with those of the main group that ran the same script, if there is one.
    """
    found = []
    labels = labels[len(subject.main):]
    for folder, groups in subject.folders.items():
        table = None
        if groups:
            code = groups[0].any.code_hash
            same = [group for group in subject.main if group.runs and group.any.code_hash == code]
            table = group_table(groups, labels[:len(groups)], args, same[-1] if same else None)
            labels = labels[len(groups):]
        found.append({"name": folder, "table": table, "tsv": tsv_tables(Path(args.paths[0], folder))})
    return found


def tsv_tables(folder: Path) -> list[Table]:
    """The tables in a folder of an entry, which list trials whose logs may be packed in an archive."""
    tables = []
    for path in sorted(folder.glob("*.tsv")):
        with open(path, errors="replace", newline="") as file:
            lines = csv.reader((line.replace("\0", "") for line in file), delimiter="\t", quoting=csv.QUOTE_NONE)
            rows = [[Cell(shortened(text, MAX_CELL)) for text in line[:50]]
                    for line in itertools.islice(lines, MAX_TSV_ROWS)]
        if rows:
            tables.append(Table([cell.text for cell in rows[0]], rows[1:]))
    return tables


def diffs_of(groups: list[Group], labels: list[str]) -> list[dict]:
    """The differences between the scripts of neighbouring groups: both labels and the lines of each diff."""
    scripts: dict[str, tuple[Group, str]] = {}
    for group, label in zip(groups, labels, strict=True):
        if group.any.code_span:
            scripts.setdefault(group.any.code_hash, (group, label))
    found = []
    for (old, old_label), (new, new_label) in list(itertools.pairwise(scripts.values()))[:MAX_DIFFS]:
        a, b = same_seed(old, new)
        lines = code_diff(code_lines(a), code_lines(b))[:MAX_DIFF_LINES]
        found.append({"old": old_label, "new": new_label, "lines": [shortened(line, MAX_CELL) for line in lines]})
    return found
