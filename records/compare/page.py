"""Page: all about a comparison as one HTML file, which needs no network and opens from disk."""
import base64
import hashlib
import itertools
import json
import os
import shlex
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from .difference import code_lines, differing, facts_of
from .groups import WHERE, Group, by_seed, claims_of, differences, group_runs, labels_of, same_seed
from .listing import side_by_side
from .logs import DATED, Run, UserError, find_runs, sample_of, why_incomplete
from .markup import Markup, element, joined, link, script_data, sortable
from .plots import curves_of, unit_of
from .statistics import difference, mean, spread
from .table import cells_of, columns_of, row_of
from .text import count, finite, seconds, shortened, visible
from .verdict import Judgement, judged, the_group

HERE = Path(__file__).parent
CURVE_POINTS = 200       # of a group's curve, at most
PACE_POINTS, PACE_RUNS = 120, 12
GROUPS_ON = 8            # whose curves are shown at first
COLUMNS, DIFFERENCES, SAMPLES = 8, 4, 24   # groups in the table of settings, pairs of scripts, groups with samples
LINE, SAMPLE = 1_000, 20_000   # characters of a cell and of a sample
TSV_ROWS = 5_000
TITLES = {"ablation": "Ablations", "ablations": "Ablations", "screening": "Screening", "tuning": "Tuning"}  # come first
NUMBERS = {"runs": "runs", "steps": "steps", "val loss": "val_loss_mean", "target": "target", "p": "p_value",
           "training time": "train_time_ms_mean", "step": "step_avg_ms", "met by": "reached",
           "to target": "train_time_ms_to_target", "tokens to target": "tokens_to_target"}


# ---------------------------------------------------------------------------------------------------------------------
# What is on the page

@dataclass
class Subject:
    """The groups that a page is about."""
    main: list[Group]                              # two sides: the baseline, A, then the candidate, B
    two_sides: bool = False
    no_verdict: str = ""                           # why there are two paths, but not two sides
    sections: dict[str, list[Group]] = field(default_factory=dict)   # by folder
    remarks: list[str] = field(default_factory=list)

    @property
    def groups(self) -> list[Group]:
        return [*self.main, *itertools.chain(*self.sections.values())]


def subject_of(paths: list[str]) -> Subject:
    """What the logs below paths are about. Raises UserError."""
    if len(paths) == 1 and os.path.isdir(paths[0]):
        return of_folder(paths[0])
    if len(paths) == 2:
        found = [find_runs([path], direct=True) for path in paths]
        sides = [group_runs(runs) for runs, _ in found]
        subject = Subject([*sides[0], *sides[1]], remarks=[*found[0][1], *found[1][1]])
        try:
            subject.main = [the_group(side, who) for side, who in zip(sides, ("baseline", "candidate"), strict=True)]
            subject.two_sides = True
        except UserError as error:
            subject.no_verdict = str(error)
        return subject
    runs, remarks = find_runs(paths, direct=True)
    order = {id(run): number for number, run in enumerate(runs)}
    groups = sorted(group_runs(runs), key=lambda group: min(order[id(run)] for run in group.runs + group.incomplete))
    return Subject(groups, len(groups) == 2, remarks=remarks)


def of_folder(path: str) -> Subject:
    """An entry: the logs in it against those in its baseline/, the other folders in it as sections of their own."""
    runs, remarks = find_runs([path])
    by_folder: dict[str, list[Run]] = {}
    for run in runs:
        by_folder.setdefault(os.path.relpath(os.path.dirname(run.path) or ".", path), []).append(run)
    for item in Path(path).iterdir():
        if item.is_dir() and any(item.glob("*.tsv")):
            by_folder.setdefault(item.name, [])  # trials that are listed, whose logs do not lie there one by one
    order = sorted(by_folder, key=lambda folder: (TITLES.get(folder.lower(), "~"), folder))
    groups = {folder: group_runs(by_folder[folder]) for folder in order}
    main = groups.pop(".", [])
    if len(main) == 1 and len(groups.get("baseline", [])) == 1:
        return Subject([*groups.pop("baseline"), *main], True, sections=groups, remarks=remarks)
    if not main:
        everything = list(itertools.chain(*groups.values()))
        claims = claims_of(everything)
        main = claims or everything
        chosen = set(map(id, main))
        rest = {folder: [g for g in some if id(g) not in chosen] for folder, some in groups.items()}
        groups = {folder: some for folder, some in rest.items() if some or not by_folder[folder]}
    return Subject(main, len(main) == 2 and not groups, sections=groups, remarks=remarks)


def report(args) -> int:
    """Writes a page about logs: verdict, table, curves, what differs, runs, samples; of an entry's folder also its
    ablations. With two paths, or an entry with a baseline/, the first (baseline/) is A, the baseline, the other B.
    """
    if Path(args.out).suffix not in (".html", ".htm"):
        raise UserError(f"-o is {args.out}, expected a name that ends in .html")
    Path(args.out).write_text(page_of(subject_of(args.paths), args), encoding="utf-8")
    print(args.out)
    return 0


def page_of(subject: Subject, args) -> str:
    """The HTML file."""
    labels = names_of(subject.groups)
    main = labels[:len(subject.main)]
    title = main[0] if len(main) == 1 else f"{main[0]} and {count(len(main) - 1, 'other group')}"
    if subject.two_sides:
        title = f"{main[1]} against {main[0]}"
    elif len(args.paths) == 1 and os.path.isdir(args.paths[0]):
        title = os.path.basename(os.path.abspath(args.paths[0]))
    parts = []
    if subject.two_sides:
        old, new = subject.main
        parts.append(verdict_part(judged(new, old, args), main, args))
    elif subject.no_verdict:
        parts.append(section("No verdict", element("pre", subject.no_verdict)))
    parts += [table_part(subject, main, args), curves_part(subject), settings_part(subject.main, main)]
    shown = len(subject.main)
    for folder, groups in subject.sections.items():
        parts.append(section_part(folder, groups, labels[shown:shown + len(groups)], subject, main, args))
        shown += len(groups)
    parts += [samples_part(subject, main), runs_part(subject, labels, args.out), code_part(subject.main, main)]
    parts = [part for part in parts if part]
    contents = element("nav", *(element("a", part.heading, href=f"#part{number}") for number, part in enumerate(parts)))
    body = [element("section", element("h2", part.heading), part.body, id=f"part{number}")
            for number, part in enumerate(parts)]
    command = shlex.join(["python", "records/compare.py", "report", *args.paths, "-o", args.out])
    foot = element("footer", f"{time.strftime('%Y-%m-%d %H:%M')}, {shortened(command, 2_000)}")
    style, script = (HERE / "page.css").read_text(), (HERE / "page.js").read_text()
    # Even if a text of a log were taken for HTML, no script but this one would run, and nothing be fetched.
    policy = (f"default-src 'none'; script-src 'sha256-{digest(script)}'; style-src 'sha256-{digest(style)}'; "
              "base-uri 'none'; form-action 'none'")
    return "\n".join([
        "<!doctype html>", '<html lang="en">', "<head>", '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        element("title", title), f"<style>{style}</style>", "</head>", "<body>",
        element("main", element("h1", title), contents, *body), foot,
        f'<script type="application/json" id="data">{script_data(chart_data(subject, labels))}</script>',
        f"<script>{script}</script>", "</body>", "</html>", ""])


def digest(text: str) -> str:
    """As a content security policy names a script."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def names_of(groups: list[Group]) -> list[str]:
    """Labels; of the same runs on two sides, with the logs' place."""
    labels = labels_of(groups)
    counts = Counter(labels)
    return [f"{label} ({group.path})" if counts[label] > 1 else label
            for group, label in zip(groups, labels, strict=True)]


@dataclass
class Section:
    """A part of the page, to which its head has a link."""
    heading: str
    body: Markup


def section(heading: str, *children) -> Section:
    """A part with these children."""
    return Section(heading, joined(children))


# ---------------------------------------------------------------------------------------------------------------------
# The parts

def verdict_part(found: Judgement, labels: list[str], args) -> Section:
    """The two questions, faster and better, in words; then each rule."""
    new, old = found.new, found.old
    who = element("p", element("b", "A"), f", the baseline: {labels[0]}. ", element("b", "B"), f": {labels[1]}.",
                  class_="sides")
    rules = {rule.name: rule for rule in found.rules}
    other = "same hardware" in rules and rules["same hardware"].passed is False
    apart = "run in turn" in rules and "machine's" in rules["run in turn"].figures
    word, why = "not known", "The logs of a side tell no training time."
    if new.times and old.times:
        ratio, p = mean(new.times) / mean(old.times), found.faster_p
        why = (f"B takes {ratio:.3f} of A's training time: {times_of(new)} after {times_of(old)}. "
               + ("Not tested: a test needs 2 runs of each." if p is None else
                  f"Welch's t-test, one-sided: p = {p:.2g}, needed < {args.p:g}."))
        word = ("not tested" if p is None else "yes, faster" if p < args.p else
                "no, slower" if 1 - p < args.p and ratio > 1 else "not shown")
        why += " The hardware differs: the times do not compare." * other
        why += " They did not run in turn: a part of it may be the machine's." * (apart and not other)
        compiled = [group.any.facts.get("compiled") for group in (old, new)]
        why += f" Only {'A' if compiled[0] else 'B'} is compiled." * (sorted(map(str, compiled)) == ["False", "True"])
    cards = [card("Faster?", word, why)]
    if found.contrasts:
        first, *others = found.contrasts
        word = ("not tested" if first.p is None else "no difference shown" if first.p >= args.p else
                "yes, better" if first.apart < 0 else "no, worse")
        why = (f"B ends at {spread(first.new)}, A at {spread(first.old)}: {first.apart:+.4f}. "
               + (f"Not tested: {first.how}." if first.p is None else f"p = {first.p:.2g}, two-sided: {first.how}."))
        for contrast in others:
            tested = "not tested" if contrast.p is None else f"p = {contrast.p:.2g}"
            why += f" At equal steps, {contrast.name}: {contrast.apart:+.4f}, {contrast.word} ({tested})."
        cards.append(card("Learns better?", word, why))
    words = ["not tested" if "a test needs" in rule.figures else rule.word for rule in found.rules]
    kinds = {"pass": "pass", "FAIL": "fail"}
    rows = [element("tr", element("td", word, class_=f"rule {kinds.get(word, 'unknown')}"),
                    element("th", rule.name, scope="row"), element("td", rule.figures))
            for word, rule in zip(words, found.rules, strict=True)]
    note = [element("p", "A and B are the same script.")] if found.same_script else []
    unknown = any(rule.passed is None for rule in found.rules)
    kind = "fail" if found.failed else "unknown" if unknown else "pass"
    conclusion = f"{found.conclusion[0].upper()}{found.conclusion[1:]}."
    if min(len(new.runs), len(old.runs)) < 2:
        kind, conclusion = "unknown", "No claim yet: a test needs 2 complete runs of each side, or more."
    return section("Verdict", who, element("p", conclusion, class_=f"conclusion {kind}"),
                   element("div", *cards, class_="cards"), *note,
                   element("div", element("table", *rows, class_="rules"), class_="wide"))


def times_of(group: Group) -> str:
    """Mean and deviation of the training time."""
    return spread([ms / 1000 for ms in group.times], ".2f").replace(" (n", " s (n")


def card(question: str, answer: str, why: str) -> Markup:
    """A question, its answer, the figures."""
    kind = {"yes": "pass", "no": "fail"}.get(answer.split(",")[0], "unknown")
    return element("div", element("h3", question), element("p", answer.capitalize(), class_=f"answer {kind}"),
                   element("p", why), class_="card")


def group_table(groups: list[Group], labels: list[str], args, more=None) -> Markup:
    """A row for each group. more: its further cells, by column, after the loss; columns that are alike are then left
    out.
    """
    rows = [row_of(group, label, args.target) for group, label in zip(groups, labels, strict=True)]
    shown = []
    for group, row in zip(groups, rows, strict=True):
        cells = cells_of(row)
        further = {} if more is None else more(group)
        end = list(cells).index("val loss") + 1
        shown.append(dict([*list(cells.items())[:end], *further.items(), *list(cells.items())[end:]]))
    names = [name for name in columns_of(shown) if name != "torch"]  # the settings tell it
    if more and len(shown) > 1:
        names = [name for name in names if name == "runs" or any(cells[name] != shown[0][name] for cells in shown)]
    return sortable(names, [[cells[name] if name not in NUMBERS else (cells[name], row[NUMBERS[name]])
                             for name in names] for cells, row in zip(shown, rows, strict=True)])


def table_part(subject: Subject, labels: list[str], args) -> Section:
    """The groups, and what is to be said of logs that do not count."""
    notes = [f"{run.path}: {why_incomplete(run)}" for group in subject.groups for run in group.incomplete]
    notes += [f"{run.path} is there twice, counted once" for group in subject.groups for run in group.duplicates]
    notes += subject.remarks
    told = [element("details", element("summary", count(len(notes), "note") + " on logs that are not counted"),
                    element("ul", *(element("li", note) for note in notes[:200]),
                            *([element("li", f"and {len(notes) - 200:,} more")] if len(notes) > 200 else [])))]
    return section("Results", group_table(subject.main, labels, args), *(told if notes else []))


def curves_part(subject: Subject) -> Section:
    """The places where the script draws."""
    places = [element("figure", element("figcaption", caption), element("div", class_="plot", data_x=kind))
              for kind, caption in (("time", "Validation loss against training time"),
                                    ("tokens", "Validation loss against tokens"),
                                    ("steps", "Validation loss against steps"),
                                    ("pace", "Time a step over the run, a line for each run"))]
    keys = element("div", element("div", id="legend"), element(
        "div", element("button", "all", type="button", id="all"), element("button", "none", type="button", id="none"),
        element("label", Markup('<input type="checkbox" id="end">'), " only the last third"), class_="tools"))
    return section("Curves", keys, element("noscript", "The curves are drawn by the page's script."),
                   element("div", *places, class_="plots"),
                   element("p", "Mean over a group's runs; the band reaches from the lowest to the highest. A click on "
                           "a name switches its curves on and off.", class_="hint"))


def chart_data(subject: Subject, labels: list[str]) -> dict:
    """What the script draws."""
    def figures(values, digits):
        return [None if finite(value) is None else round(value, digits) for value in values]
    groups = []
    for number, (group, label) in enumerate(zip(subject.groups, labels, strict=True)):
        points = [[step, *figures(losses, 6), *figures([ms], 1), group.tokens_before(step)]
                  for step, *losses, ms in thin(curves_of(group), CURVE_POINTS)]
        paces = []
        for run in group.runs or group.incomplete:
            intervals = run.pace.intervals(after=run.restart_step)
            if intervals:
                usual = sorted(ms for _, ms in intervals)[len(intervals) // 2]
                paces.append((max(ms for _, ms in intervals) / (usual or 1), run, intervals))
        odd = sorted(paces, key=lambda pace: -pace[0])[:PACE_RUNS]
        groups.append({
            "label": visible(label), "runs": len(group.runs), "target": finite(group.any.target),
            "on": number < min(GROUPS_ON, len(subject.main)),
            "curve": [point for point in points if None not in point[1:4]], "left": len(paces) - len(odd),
            "paces": [{"name": visible(name_of(run)),
                       "points": [[step, *figures([ms], 3)] for step, ms in slowest(intervals, PACE_POINTS)]}
                      for _, run, intervals in odd]})
    return {"groups": groups, "unit": unit_of(subject.groups)}


def thin(points: list, most: int) -> list:
    """At most so many of them, evenly spread, with the last."""
    each = -(-len(points) // most) or 1
    return points[:-1][::each] + points[-1:]


def slowest(intervals: list[tuple[int, float]], most: int) -> list[tuple[int, float]]:
    """At most so many of them; of neighbours the slowest, so that no stall is lost."""
    each = -(-len(intervals) // most) or 1
    return [max(intervals[i:i + each], key=lambda interval: interval[1]) for i in range(0, len(intervals), each)]


def name_of(run: Run) -> str:
    """A run among those of its group."""
    seed = run.hyperparameters.get("seed")
    return os.path.basename(run.path) if seed is None else f"seed {seed}, {os.path.basename(run.path)}"


def code_part(groups: list[Group], labels: list[str]) -> Section | None:
    """The scripts of neighbours among the groups of different code, side by side."""
    scripts, seen = [], set()
    for group, label in zip(groups, labels, strict=True):
        if group.any.code_hash not in seen and group.any.code_span:
            seen.add(group.any.code_hash)
            scripts.append((group, label))
    if len(scripts) < 2:
        told = "The logs embed no code." if not scripts else (
            "All groups ran the same script." if all(group.any.code_span for group in groups) else
            "Only one script is embedded in the logs.")
        return section("Code", element("p", told)) if len(groups) > 1 else None
    pairs = list(zip(scripts, scripts[1:], strict=False))
    parts = []
    for (old, old_label), (new, new_label) in pairs[:DIFFERENCES]:
        runs = same_seed(old, new)
        body = side_by_side(*(code_lines(run) for run in runs))
        heads = element("div", element("div", old_label), element("div", new_label), class_="heads")
        parts.append(joined([heads, body]) if len(pairs) == 1 else element(
            "details", element("summary", f"{old_label} → {new_label}"), heads, body))
    if len(pairs) > DIFFERENCES:
        parts.append(element("p", f"{count(len(pairs) - DIFFERENCES, 'more pair')} of scripts: name two paths."))
    tools = element("p", element("button", "unfold all", type="button", id="unfold"),
                    " Lines in which only white space differs count as unchanged.", class_="tools")
    return section("Code", tools, *parts)


def settings_part(groups: list[Group], labels: list[str]) -> Section:
    """The settings and the environment in which the groups differ; of one group, all."""
    shown = groups[:COLUMNS]
    runs = list(same_seed(*shown)) if len(shown) == 2 else [group.typical for group in shown]
    facts = [{name: value for name, value in facts_of(run).items() if name not in ("--seed", "--entry")}
             for run in runs]
    told = differing(facts) if len(facts) > 1 else {name: [value] for name, value in sorted(facts[0].items())}
    if not told:
        return section("Settings and environment", element("p", "Nothing differs that the logs tell."))

    def cell(value):
        return element("td", "not told" if value is None else shortened(
            value if isinstance(value, str) else json.dumps(value), LINE), class_="none" if value is None else None)
    rows = [element("tr", element("th", name, scope="row"), *map(cell, values)) for name, values in told.items()]
    head = element("tr", element("th"), *(element("th", label, scope="col") for label in labels[:COLUMNS]))
    table = element("div", element("table", element("thead", head), element("tbody", *rows)), class_="wide")
    if len(facts) == 1:
        table = element("details", element("summary", count(len(rows), "value")), table)
    more = [element("p", f"The first {COLUMNS} of {len(groups):,} groups.")] if len(groups) > COLUMNS else []
    return section("Settings and environment" + " that differ" * (len(facts) > 1), table, *more)


def runs_part(subject: Subject, labels: list[str], out: str) -> Section:
    """Each run, with a link to its log."""
    rows = []
    for group, label in zip(subject.groups, labels, strict=True):
        for run in group.runs + group.incomplete:
            seed, loss, ms = run.hyperparameters.get("seed"), run.val_loss, run.train_time_ms
            rows.append([label, ("" if seed is None else str(seed), seed),
                         (f"{loss:.4f}", finite(loss)) if loss is not None else why_incomplete(run),
                         (seconds(ms, 2), ms), (seconds(run.step_avg_ms and run.step_avg_ms * 1000, 2)[:-2] + " ms"
                                                if run.step_avg_ms else "", run.step_avg_ms),
                         (str(run.last_step), run.last_step), link(run.path, out)])
    return section("Runs", sortable(["group", "seed", "final val loss", "training time", "step", "last step", "log"],
                                    rows))


def samples_part(subject: Subject, labels: list[str]) -> Section | None:
    """What the models wrote."""
    parts = []
    for group, label in list(zip(subject.main, labels, strict=True))[:SAMPLES]:
        ordered = sorted(group.runs or group.incomplete, key=lambda run: run is not group.typical)
        samples = [(run, text) for run in ordered[:PACE_RUNS] if (text := sample_of(run))]
        if samples:
            first, *others = [element("figure", element("figcaption", f"{label}, {name_of(run)}"),
                                      element("pre", shortened(text, SAMPLE), dir="auto")) for run, text in samples]
            more = [element("details", element("summary", count(len(others), "more sample")), *others)]
            parts.append(element("div", first, *(more if others else [])))
    return section("Samples", element("div", *parts, class_="samples")) if parts else None


def section_part(folder: str, groups: list[Group], labels: list[str], subject: Subject, main: list[str],
                 args) -> Section:
    """A folder of an entry, with the difference of its losses to the entry's."""
    title = TITLES.get(folder.lower()) or (
        folder if DATED.search(folder) else folder.replace("_", " ").capitalize())
    tables = tables_in(Path(args.paths[0], folder), args.out)
    if not groups:
        return section(title, *tables)
    same = [(group, label) for group, label in zip(subject.main, main, strict=True)
            if group.runs and group.any.code_hash == groups[0].any.code_hash]
    usual, name = (same or [(None, "")])[-1]

    def more(group):
        if usual is None or not group.runs:
            return {"difference": "", "p of it": ""}
        apart, p, _ = difference(by_seed(group.losses, group.runs), by_seed(usual.losses, usual.runs))
        return {"difference": (f"{apart:+.4f}", finite(apart)), "p of it": "" if p is None else (f"{p:.2g}", p)}
    told = []
    if usual is not None:
        where = [{item for item in differences(group.told, usual.told).items() if item[0] in WHERE}
                 for group in groups]
        ran = ", ".join(sorted(f"{key} {value}" for key, value in set.intersection(*where)))
        told = [element("p", f"The difference is that of the final loss to {name}"
                        + (f", which all of these differ from by where they ran: {ran}." if ran else "."))]
    if len({group.entry for group in groups}) == 1:  # which the heading says already
        labels = [label.removeprefix(groups[0].entry).removeprefix(", ") or groups[0].entry for label in labels]
    return section(title, *told, group_table(groups, labels, args, more), *tables)


def tables_in(folder: Path, out: str) -> list[Markup]:
    """The tables (.tsv) and archives in a folder of an entry: trials whose logs need not lie there one by one."""
    files = [file for file in sorted(folder.iterdir()) if file.is_file()] if folder.is_dir() else []
    archives = [link(str(file), out) for file in files if file.name.endswith((".tar.gz", ".tgz", ".zip", ".tar"))]
    parts = [element("p", "Logs in ", archive, ", which is not read.") for archive in archives]
    for file in [file for file in files if file.suffix == ".tsv"]:
        lines = [line[:LINE * 20].split("\t") for line in
                 file.read_text(errors="replace").splitlines()[:TSV_ROWS] if line.strip()]
        if len(lines) > 1:
            names = [shortened(cell, LINE) for cell in lines[0][:50]]
            rows = [[tsv_cell(cell, folder, out) for cell in (line + [""] * len(names))[:len(names)]]
                    for line in lines[1:]]
            parts += [element("p", "As listed in ", link(str(file), out), f", {count(len(rows), 'row')}:"),
                      sortable(names, rows)]
    return parts


def tsv_cell(cell: str, folder: Path, out: str):
    """A number sorts as one; a log is linked."""
    try:
        return (cell, finite(float(cell)))
    except ValueError:
        is_log = cell.endswith((".txt", ".log")) and "/" not in cell and len(cell) < 200 and (folder / cell).is_file()
        return link(str(folder / cell), out) if is_log else shortened(cell, LINE)
