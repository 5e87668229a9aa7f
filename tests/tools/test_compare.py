"""The commands of tools/compare on made logs: table, verify, diff, plot, extract, runs-needed."""
import hashlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from made_logs import (
    CODE,
    LOSSES,
    NEW_TIMES,
    OLD_TIMES,
    SEPARATOR,
    facts,
    log,
    main,
    metrics,
    running,
    smi,
    write,
    write_entries,
    write_runs,
    write_seeds,
)
from scipy import stats

from tools import compare
from tools.compare.stats import difference

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def sides(tmp_path):
    """Folders with the runs of a baseline and of a candidate whose claim holds."""
    return (write_runs(tmp_path / "old", [loss + 0.0001 for loss in LOSSES], OLD_TIMES),
            write_runs(tmp_path / "new", LOSSES, NEW_TIMES))


def words_of_rules(text):
    """The rules that verify printed: the word (pass, FAIL, unknown) by the rule's name."""
    found = {}
    for line in text.splitlines():
        word, _, rest = line.partition(" ")
        if word in ("pass", "FAIL", "unknown"):
            parts = rest.strip()[3:].split(": ")  # without the number
            found[parts[0]] = word
            found[": ".join(parts[:2])] = word  # "distinct seeds: candidate"
    return found


def verify(capsys, new, old, *flags):
    """verify's exit code and its rules."""
    code = main("verify", new, "--baseline", old, *flags)
    return code, words_of_rules(capsys.readouterr().out)


# Statistics

def test_the_tests_are_those_of_scipy():
    a, b = [3.2751, 3.2802, 3.2769, 3.2779], [3.2791, 3.2803, 3.2785]
    one_sample = stats.ttest_1samp(a, 3.28, alternative="less").pvalue
    assert compare.t_test_below(a, 3.28) == pytest.approx(one_sample)
    welch = stats.ttest_ind(a, b, equal_var=False, alternative="less").pvalue
    assert compare.welch_test_below(a, b) == pytest.approx(welch)
    assert compare.t_test_below([3.0], 3.28) is None and compare.welch_test_below(a, [3.0]) is None
    assert compare.t_test_below([3.0, 3.0], 3.28) == 0
    assert compare.t_test_below([3.3, 3.3], 3.28) == 1
    assert compare.t_test_below([3.0, math.nan], 3.28) is None
    a, b = dict(enumerate(a)), dict(enumerate([3.282, 3.276, 3.2755, 3.275]))
    paired = stats.ttest_rel(list(a.values()), list(b.values())).pvalue
    assert difference(a, b)[1] == pytest.approx(paired)
    other_seeds = {seed + 1: loss for seed, loss in b.items()}
    welch = stats.ttest_ind(list(a.values()), list(b.values()), equal_var=False).pvalue
    assert difference(a, other_seeds)[1] == pytest.approx(welch)


@pytest.mark.slow
def test_runs_needed(capsys):
    def p(n):
        return stats.t.sf(0.001 * math.sqrt(n) / 0.0013, n - 1)

    n = compare.runs_needed(0.0013, 0.001, 0.01)
    assert p(n) <= 0.01 < p(n - 1)
    more = compare.runs_needed(0.0013, 0.001, 0.01, power=0.8)
    samples = stats.norm.rvs(3.279, 0.0013, size=(4000, more), random_state=0)
    passed = (stats.ttest_1samp(samples, 3.28, axis=1, alternative="less").pvalue < 0.01).mean()
    assert more > n and passed == pytest.approx(0.8, abs=0.04)
    assert main("runs-needed", "--sd", "0.0013", "--margin", "0.001") == 0
    out = capsys.readouterr().out
    assert str(n) in out and str(more) in out


# verify

@pytest.mark.parametrize("losses, times, more, broken", [
    (LOSSES, NEW_TIMES, {}, None),
    (LOSSES, [ms + 200 for ms in NEW_TIMES], {}, "faster"),
    ([3.2771, 3.2901, 3.2675, 3.2879, 3.2768], NEW_TIMES, {}, "mean val loss <= 3.28"),
    (LOSSES, NEW_TIMES, {"environment": smi(8)}, "same hardware"),
    (LOSSES, NEW_TIMES, {"environment": smi(torch="2.13.0")}, "same torch"),
    ([3.2771] * 5, NEW_TIMES, {}, "distinct seeds: candidate"),
    (LOSSES[:1], NEW_TIMES[:1], {}, "mean val loss <= 3.28")])
def test_each_rule_can_break_a_claim(tmp_path, capsys, sides, losses, times, more, broken):
    new = write_runs(tmp_path / "other", losses, times, **more)
    code, rules = verify(capsys, new, sides[0])
    assert code == (1 if broken else 0)
    assert rules[broken] == "FAIL" if broken else "FAIL" not in rules.values()
    assert rules["same data"] == "unknown"


@pytest.mark.slow
def test_other_targets_and_other_data_break_a_claim(tmp_path, capsys):
    values = {"target": 3.28, "data_fingerprint": "abc"}
    old = write_seeds(tmp_path / "old", LOSSES, range(5), **values)
    for name, value, rule in (("target", 9.1, "same target"),
                              ("data_fingerprint", "x", "same data")):
        new = write_seeds(tmp_path / name, LOSSES, range(5), **{**values, name: value})
        code, rules = verify(capsys, new, old)
        assert code == 1 and rules[rule] == "FAIL"


@pytest.mark.parametrize("new, word", [("abc-def", "pass"), ("abc-def-1", "unknown"),
                                       ("abc-x-1", "FAIL"), (None, "FAIL")])
def test_a_fingerprint_with_a_part_more_may_be_of_the_same_data(tmp_path, capsys, new, word):
    old = write_seeds(tmp_path / "old", LOSSES, range(5), data_fingerprint="abc-def")
    new = write_seeds(tmp_path / "new", LOSSES, range(5), data_fingerprint=new)
    assert verify(capsys, new, old)[1]["same data"] == word


def test_a_side_of_two_torch_versions_is_not_the_same_as_another_such_side(tmp_path, capsys):
    for side, losses, times in (("old", LOSSES, OLD_TIMES), ("new", LOSSES, NEW_TIMES)):
        for numbers, torch in ((slice(0, 3), "2.11.0"), (slice(3, 5), "2.13.0")):
            texts = [log(code=f"import {side}\n", environment=smi(torch=torch),
                         body=metrics(loss, time_ms=ms))
                     for loss, ms in zip(losses[numbers], times[numbers], strict=True)]
            write(tmp_path / side, texts, name=torch + "-{}.txt")
    code, rules = verify(capsys, tmp_path / "new", tmp_path / "old")
    assert code == 1 and rules["same torch"] == "FAIL"


def test_runs_that_validated_on_a_part_of_the_tokens_are_no_claim(tmp_path, capsys):
    hyperparameters = {"track": "laptop", "val_tokens": 2048}
    environment = facts(hyperparameters=hyperparameters, target=3.28)
    entry = tmp_path / "2030-01-01_New"
    new = write_runs(entry, LOSSES, NEW_TIMES, environment=environment)
    old = write_runs(tmp_path / "old", LOSSES, OLD_TIMES, environment=environment)
    code, rules = verify(capsys, new, old)
    assert code == 1 and rules["whole validations: candidate"] == "FAIL"
    assert main("table", "--json", new) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["reached"] == 0 and row["p_value"] is None and not row["claim"]


def test_the_held_out_loss_is_shown_and_judges_nothing(tmp_path, capsys):
    """The line is none of the validations, and one in the embedded source is none at all."""
    held_out = [1.25, 1.27]
    code = f"{CODE}held_out_loss:9.9999 of no tokens\n"
    bodies = [f"{metrics(loss)}held_out_loss:{other:.4f} of the 2,048 tokens\n"
              for loss, other in zip(LOSSES, held_out, strict=False)]
    new = write(tmp_path / "new", [log(code=code, body=body) for body in bodies])
    assert main("table", "--json", new) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["held_out_loss_mean"] == pytest.approx(1.26) and row["runs"] == 2
    assert row["val_loss_mean"] == pytest.approx(sum(LOSSES[:2]) / 2)
    assert main("table", "--all", new) == 0
    assert "1.2600" in capsys.readouterr().out


def test_verify_names_a_log_without_a_step(capsys, sides):
    write(Path(sides[1]), [log(body="run failed\n")], name="failed.txt")
    assert main("verify", sides[1], "--baseline", sides[0]) == 0
    assert f"{sides[1]}/failed.txt" in capsys.readouterr().out


@pytest.mark.parametrize("side", ["candidate", "baseline"])
def test_the_side_whose_logs_have_no_times_is_named(tmp_path, capsys, sides, side):
    texts = [log(code="new = 1\n", body=metrics(loss).replace("train_time:", "x:"))
             for loss in LOSSES]
    paths = [write(tmp_path / "timeless", texts), sides[0]]
    new, old = paths if side == "candidate" else reversed(paths)
    assert main("verify", new, "--baseline", old) == 1
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if re.match(r"\w+ +5\. ", line)]
    assert line.startswith("FAIL") and side in line


def test_the_rules_have_the_numbers_of_the_page_that_lists_them(capsys, sides):
    assert main("verify", sides[1], "--baseline", sides[0]) == 0
    numbers = re.findall(r"^\w+ +(\d)\. ", capsys.readouterr().out, re.M)
    assert numbers == sorted(numbers)
    page = (ROOT / "docs/rules.md").read_text()
    assert sorted(set(numbers)) == re.findall(r"^(\d)\. \*\*", page, re.M)


def test_verify_of_a_candidate_says_that_nothing_is_measured(tmp_path, capsys):
    """In one line, with or without a baseline."""
    entry = tmp_path / "records/candidates/2030-01-01_New"
    entry.mkdir(parents=True)
    (entry / "simulated.out").write_text("step 1\n")
    old = write_runs(tmp_path / "old", LOSSES, OLD_TIMES)
    for words in ([entry], [entry, "--baseline", old]):
        assert main("verify", *words) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and str(entry) in err and "measured" in err


@pytest.mark.slow
@pytest.mark.parametrize("change, code", [(0.0, 0), (0.01, 1), (-0.01, 0)])
def test_systems_only_asks_whether_the_loss_got_worse(tmp_path, capsys, change, code):
    base = [3.2951, 3.3102, 3.3069, 3.2979, 3.3033]  # above the target, which is waived
    old = write_runs(tmp_path / "old", [loss + 0.0001 for loss in base], OLD_TIMES)
    new = write_runs(tmp_path / "new", [loss + 2 * change for loss in base], NEW_TIMES)
    assert verify(capsys, new, old, "--systems-only")[0] == code
    assert verify(capsys, new, old)[0] == 1


@pytest.mark.slow
@pytest.mark.parametrize("old_minutes, new_minutes, word", [
    ((0, 2, 4), (1, 3, 5), "pass"), ((0, 1, 2), (3, 4, 5), "unknown"),
    ((3, 4, 5), (0, 1, 2), "unknown")])
def test_runs_in_separate_blocks_are_reported(tmp_path, capsys, old_minutes, new_minutes, word):
    """On a machine that others use too, two blocks of runs compare the hours as well."""
    for side, minutes in (("old", old_minutes), ("new", new_minutes)):
        for i, minute in enumerate(minutes):
            environment = facts(run_id=f"laptop-20260101-12{minute:02}00-abcdef")
            text = log(code=f"import {side}\n", environment=environment, body=metrics(LOSSES[i]))
            write(tmp_path / side, [text], name=f"{i}.txt")
    assert verify(capsys, tmp_path / "new", tmp_path / "old")[1]["interleaved runs"] == word


@pytest.mark.slow
def test_verify_wants_whole_runs_of_one_script(capsys, sides):
    old, new = sides
    cut = Path(new, "cut.txt")
    cut.write_text(log(code=f"{CODE}# new\n", body=metrics(died_at=12)))
    code, rules = verify(capsys, new, old)
    assert code == 1 and rules["complete runs: candidate"] == "FAIL"
    for number in range(30):
        Path(new, f"other{number}.txt").write_text(log(code=f"import y{number}\n"))
    assert main("verify", new, "--baseline", old) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10 and "31" in lines[-1]  # the first 8 groups, each with its own name
    assert len({line.partition(": ")[0] for line in lines[:8]}) == 8


@pytest.mark.slow
def test_verify_of_an_entry_compares_the_logs_in_it_with_its_baseline(tmp_path, capsys):
    entry = tmp_path / "2030-01-01_New"
    write_runs(entry, LOSSES, NEW_TIMES)
    write_runs(entry / "baseline", [loss + 0.0001 for loss in LOSSES], OLD_TIMES, code="old = 1\n")
    write_runs(entry / "ablation", [3.4], [900], code="import ablation\n")
    assert main("verify", entry) == 0
    assert main("verify", *sorted(entry.glob("*.txt"))) == 0  # as a shell expands it
    assert main("verify", entry / "ablation") == 2
    assert "--baseline" in capsys.readouterr().err


@pytest.mark.slow
def test_the_measured_entry_of_the_laptop_track_holds(capsys):
    (entry,) = (ROOT / "records").rglob("2026-11-25_Stages")
    assert main("verify", entry) == 0


# table

def test_table(tmp_path, capsys):
    losses, times = [3.2751, 3.2802, 3.2769, 3.2779], [2000, 2010, 2030, 1990]
    write_runs(tmp_path / "slow", losses, times)
    write_runs(tmp_path / "fast", [3.279], [1000])
    assert main("table", "--json", tmp_path) == 0
    fast, slow = json.loads(capsys.readouterr().out)
    assert slow["val_loss_sd"] == pytest.approx(stats.tstd(losses))
    assert slow["train_time_ms_mean"] == 2007.5 and slow["path"].endswith("slow")
    assert slow["p_value"] == pytest.approx(compare.t_test_below(losses, 3.28))
    assert (fast["entry"], slow["entry"]) == ("fast", "slow")
    assert fast["val_loss_sd"] is fast["p_value"] is fast["train_time_ms_sd"] is None
    assert main("table", "--markdown", tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()[:4]
    assert len({line.count("|") for line in lines}) == 1 and "3.2775 ± 0.0021" in lines[3]


@pytest.mark.slow
@pytest.mark.parametrize("place", ["", "published", "laptop", "candidates"])
def test_the_table_has_a_row_for_each_entrys_claim(tmp_path, capsys, place):
    """Wherever below records/ the entries lie."""
    write_entries(tmp_path / "records" / place)
    root = tmp_path / "records"
    assert main("table", root) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["2030-01-01_Old", "2030-02-02_New"]
    assert not lines[3]
    assert main("table", "--json", root) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["label"] for row in rows} >= {"2030-02-02_New, ngrams 1", "2030-03-03_Study",
                                              "2030-02-02_New, ngrams 1, muon_lr 0.2"}
    assert {row["entry"] for row in rows if row["claim"]} == {"2030-01-01_Old", "2030-02-02_New"}


@pytest.mark.slow
def test_a_claim_rests_on_the_entrys_own_runs_not_on_those_as_a_baseline(tmp_path, capsys):
    root = Path(write_entries(tmp_path))
    for path in sorted((root / "2030-02-02_New/baseline").glob("*.txt"))[:3]:
        text = path.read_text().replace('"seed": ', '"seed": 1')
        write(root / "2030-01-01_Old", [text], name=path.name)
    assert main("table", "--json", root) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["label"]: row["runs"] for row in rows if row["claim"]} == {
        "2030-01-01_Old": 3, "2030-02-02_New": 5}


@pytest.mark.slow
def test_the_table_fits_a_terminal_and_shows_what_is_invisible(tmp_path, capsys):
    for number in range(3):
        settings = {name * 20: number for name in "abcdef"}
        environment = running(8, "GPU " * 30) + facts(hyperparameters=settings)
        write(tmp_path / f"{'long_name_' * 15}{number}\u202e",
              [log(environment=environment, body=metrics(3.27 + number))])
    assert main("table", tmp_path) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines()[:4])) <= 120 and "\u202e" not in out


@pytest.mark.slow
@pytest.mark.parametrize("script, folder, name", [
    ("records/2030-01-01_New/train_gpt.py", "baseline", "2030-01-01_New"),
    ("records/laptop/2030-01-01_New/train_gpt.py", "baseline", "2030-01-01_New"),
    ("my_idea.py", "scratch", "my_idea"), ("../idea.py", "scratch", "idea"),
    ("train_gpt.py", "2030-01-01_New", "2030-01-01_New"), (None, "scratch", "scratch"),
    (None, "2026-07-17_FP8/this_pr", "2026-07-17_FP8/this_pr"),
    (None, "010425_SoftCap", "010425_SoftCap"),
    (None, "mine/logs", "mine/logs"), (None, "mine/fast", "fast")])
def test_a_run_is_named_by_its_script_or_folder(tmp_path, script, folder, name):
    known = {} if script is None else {"script": script}
    assert compare.Run(str(tmp_path / folder / "log.txt"), facts=known).entry == name


@pytest.mark.slow
def test_no_two_labels_are_alike():
    def group(code="a", gpu="H100", torch="2.13", steps=10, **settings):
        known = {"hyperparameters": settings, "script": "records/2030-01-01_New/train_gpt.py"}
        run = compare.Run("x", code_hash=code, gpu=gpu, torch=torch, world_size=8, steps=steps,
                          facts=known)
        return compare.Group([run], [], [])

    for others in ([group("b")], [group(gpu="A100")], [group(torch="2.11")], [group(steps=20)],
                   [group(lr=1.0), group(lr=2.0)],
                   [group("b"), group("b", gpu="A100"), group(lr=1.0)]):
        labels = compare.labels_of([group(lr=0.5), *others])
        assert len(set(labels)) == len(labels)
        assert all(label.startswith("2030-01-01_New") for label in labels)
    assert compare.labels_of([group()]) == ["2030-01-01_New"]


# diff, extract, plot

@pytest.mark.slow
def test_losses_are_compared_at_the_end_and_at_the_last_common_step():
    new = compare.Run("new", steps=10, curve=[(0, 10.0, 0), (5, 4.0, 1), (10, 3.0, 2)])
    old = compare.Run("old", steps=20, curve=[(0, 10.0, 0), (5, 5.0, 1), (20, 3.1, 2)])
    groups = [compare.Group([run], [], []) for run in (new, old)]
    final, common = compare.contrasts_of(*groups)
    assert final.apart == pytest.approx(-0.1) and common.apart == pytest.approx(-1)
    assert "5" in common.name and len(compare.contrasts_of(groups[0], groups[0])) == 1


@pytest.mark.slow
def test_diff_shows_code_settings_and_results(tmp_path, capsys):
    a = write_runs(tmp_path / "a", [3.28, 3.27, 3.275], [100, 300, 200],
                   code="import torch\nx = 1\n\ny  =  2\n")
    b = write_runs(tmp_path / "b", [3.26], [150], code="import torch\nx = 3\ny = 2\n",
                   environment=smi(8))
    assert main("diff", a, b) == 0
    lines = capsys.readouterr().out.splitlines()
    changes = [line for line in lines if line.startswith(("-x", "+x", "-y", "+y"))]
    assert changes == ["-x = 1", "+x = 3"]  # a change of white space is none
    assert lines[0].endswith("a/2.txt")     # the run of the median time
    assert "world_size: 1 -> 8" in lines
    assert "val_loss: 3.2750 ± 0.0050 (n = 3) -> 3.2600" in lines
    assert main("diff", a, a) == 0
    assert not [line for line in capsys.readouterr().out.splitlines() if line.startswith("@@")]


@pytest.mark.slow
def test_diff_shows_the_same_seed_on_both_sides(tmp_path, capsys):
    a = write_seeds(tmp_path / "a", [3.28, 3.27, 3.29], (0, 1, 2))
    b = write_seeds(tmp_path / "b", [3.26, 3.25, 3.27], (2, 1, 5))
    assert main("diff", a, b) == 0
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert Path(first).name == Path(second).name


@pytest.mark.slow
@pytest.mark.parametrize("code", [CODE, "import x", "import x\n", "# é\r\nimport y\n\n"])
def test_extract_gives_the_code_back_byte_for_byte(tmp_path, code):
    """If the script had no last line break, the hash in the log decides."""
    data = code.encode()
    environment = facts(code_hash=hashlib.sha256(data).hexdigest()[:12])
    text = code + ("" if code.endswith("\n") else "\n") + SEPARATOR + "\n"
    text += environment + SEPARATOR + "\n" + metrics()
    (tmp_path / "log.txt").write_bytes(text.encode())
    assert main("extract", tmp_path / "log.txt", "-o", tmp_path / "out.py") == 0
    assert (tmp_path / "out.py").read_bytes() == data
    (tmp_path / "out.py").write_text("another script")
    assert main("extract", tmp_path / "log.txt", "-o", tmp_path / "out.py") == 2


@pytest.mark.slow
@pytest.mark.parametrize("suffix, begin", [("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_plot(tmp_path, sides, suffix, begin):
    """Also of more groups than there are colours, whose names are long or mean something to TeX."""
    folders = [write_runs(tmp_path / f"{'long name ' * 9}$x_{{{i}$", [3.2, 3.3], [1000, 1001 + i])
               for i in range(9)]
    assert main("plot", *sides, *folders, "-o", tmp_path / f"curves.{suffix}") == 0
    assert (tmp_path / f"curves.{suffix}").read_bytes().startswith(begin)


@pytest.mark.slow
def test_diff_says_that_a_run_changed_when_it_was_resumed(tmp_path, capsys):
    change = "setting changed: muon_lr was 1, now 2"
    body = f"{metrics(died_at=12)}resumed from /a_step000010.pt at step 10\n{change}\n"
    a = write(tmp_path / "a", [log(body=body + metrics())])
    b = write(tmp_path / "b", [log()])
    assert main("diff", a, b) == 0
    assert change in capsys.readouterr().out


# Names and text from outside

NAMES = ["x[1]", "*", "a b", "a\nb", "-x", "--all", "caf\udce9", "naïve", "\x1b[31mred", "a'b\"c",
         "$HOME", "%s {0}", "a\\b", "\u202eevil", "a&b<c>", " x ", "a|b", "数据"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_no_pattern_no_flag_and_no_command_of_a_terminal(tmp_path, capfd, monkeypatch,
                                                                  name):
    monkeypatch.chdir(tmp_path)
    old = write_runs(tmp_path / name / "old", LOSSES, OLD_TIMES, name=name + "{}.txt")
    new = write_runs(tmp_path / name / "new", LOSSES, NEW_TIMES, name=name + "{}.txt")
    write_runs(tmp_path / "x1", [9.0], [1.0])  # what x[1] would be as a pattern
    logs = sorted(os.path.relpath(path) for path in Path(new).iterdir())
    assert main("table", "--json", "--", name) == 0
    rows = json.loads(capfd.readouterr().out)
    assert sorted(os.path.basename(row["path"]) for row in rows) == ["new", "old"]
    commands = [
        ["table", "--all", "--", name], ["table", "--markdown", "--", name],
        ["verify", "--baseline", old, "--", *logs], ["diff", "--", f"{name}/old", f"{name}/new"],
        ["report", "-o", tmp_path / "out.html", "--", f"{name}/old", f"{name}/new"],
        ["extract", "-o", tmp_path / "out.py", "--", logs[0]]]
    for words in commands:
        assert main(*words) == 0, words
        out, err = capfd.readouterr()
        assert not err and all(c.isprintable() for c in out.replace("\n", "")), words
    for words in (["table", f"{tmp_path}/{name}/none"], ["extract", "-o", tmp_path, "--", logs[0]]):
        assert main(*words) == 2
        assert capfd.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_a_log_gives_a_terminal_no_commands(tmp_path, capfd):
    evil = "\x1b]0;title\x07\x1b[2J\x9b31m\u202e\r"
    environment = running(8, f"GPU{evil}") + facts(
        hyperparameters={evil: evil, "track": evil}, script=f"records/{evil}/train_gpt.py",
        data_fingerprint=evil, torch=evil, code_hash=evil, target=3.28)
    body = f"track laptop, 1 x {evil}, log: x\n{metrics(died_at=12)}"
    body += f"resumed from /x at step 10\nsetting changed: muon_lr was {evil}, now {evil}\n"
    sides = [write(tmp_path / side, [log(code=f"# {evil}\n{side} = 1\n", environment=environment,
                                         body=body + metrics())])
             for side in "ab"]
    for words in (["table", *sides], ["table", "--all", *sides], ["table", "--markdown", *sides],
                  ["table", "--json", *sides], ["verify", sides[0], "--baseline", sides[1]],
                  ["verify", tmp_path, "--baseline", sides[1]], ["diff", *sides]):
        main(*words)
        out, err = capfd.readouterr()
        assert out + err and all(c.isprintable() for c in (out + err).replace("\n", "")), words


def start(*words, redirect="", setting="", stdout=subprocess.PIPE):
    """Runs a command of tools.compare in a shell, with redirections and environment variables."""
    command = shlex.join([sys.executable, "-m", "tools.compare", *map(str, words)])
    # Output that is not buffered fails earlier, in print.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(["bash", "-c", f"{setting} {command} {redirect}"], cwd=ROOT, timeout=300,
                          env=environment, stdout=stdout, stderr=subprocess.PIPE)


@pytest.mark.parametrize("setting", ["PYTHONIOENCODING=ascii", "PYTHONIOENCODING=latin-1:strict",
                                     "LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0"])
def test_a_console_that_is_not_utf8_gets_all_lines(tmp_path, setting):
    folder = write(tmp_path / "naïve … ±", [log()])
    done = start("table", folder, setting=setting)
    assert done.returncode == 0 and done.stdout.count(b"\n") == 2 and not done.stderr
    done = start("table", f"{folder} none", setting=setting)
    assert done.returncode == 2 and not done.stdout and done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("redirect, code, lines", [
    ("", 141, 0), ("2>&1", 141, 0), (">&-", 0, 0), ("2>&-", 141, 0), (">&- 2>&-", 0, 0),
    (">/dev/full", 2, 1), (">/dev/full 2>/dev/full", 2, 0)])
def test_a_console_that_is_gone_ends_the_command_without_a_traceback(tmp_path, redirect, code,
                                                                     lines):
    reader, closed_pipe = os.pipe()
    os.close(reader)
    folder = write(tmp_path, [log()])
    done = start("table", folder, redirect=redirect, stdout=closed_pipe)
    assert (done.returncode, done.stderr.count(b"\n")) == (code, lines), done.stderr
    done = start("--help", redirect=redirect, stdout=closed_pipe)
    assert b"Traceback" not in done.stderr and done.returncode != 120  # Python's, if it fails late
    os.close(closed_pipe)


# The command line

@pytest.mark.slow
@pytest.mark.parametrize("words, named", [
    (["table", "{}/none.txt"], "{}/none.txt"), (["table", "{}/empty"], "{}/empty"),
    (["table", "{}/bad.txt"], "{}/bad.txt"),
    (["diff", "{}/packed", "{}/empty"], "{}/packed/logs.tar.gz"),
    (["bogus"], "bogus"), (["verify", "{}"], "--baseline"),
    (["extract", "{}/metrics.txt", "-o", "{}/x"], "{}/metrics.txt"),
    (["extract", "{}/main.txt", "-o", "{}/none/x"], "{}/none/x"), (["table"], "PATH"),
    (["table", "--jsom", "{}"], "--jsom"), (["ab", "{}/a.py", "{}/b.py", "--runs", "0"], "--runs"),
    (["ab", "{}/a.py", "{}/b.py", "--runs", "1"], "{}/a.py"),
    (["runs-needed", "--sd", "0", "--margin", "1"], "--sd"),
    (["plot", "{}/main.txt", "-o", "{}/x.doc"], "{}/x.doc"),
    (["report", "{}/main.txt", "-o", "{}/x.doc"], "{}/x.doc"),
    (["diff", "{}/script.py", "{}/script.py"], "diff -u"), (["diff", "a.py", "b.py"], "a.py")])
def test_a_mistake_ends_in_one_line_that_names_it(tmp_path, capsys, words, named):
    (tmp_path / "empty").mkdir()
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed/logs.tar.gz").touch()
    (tmp_path / "script.py").touch()
    (tmp_path / "bad.txt").write_bytes(b"\0")
    (tmp_path / "metrics.txt").write_text(metrics())
    (tmp_path / "main.txt").write_text(log())
    assert main(*[word.format(tmp_path) for word in words]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and named.format(tmp_path) in errors


def test_the_table_imports_nothing_that_is_slow(tmp_path):
    folder = write(tmp_path, [log()])
    program = """if True:
        import sys
        from tools import compare
        code = compare.main(["table", sys.argv[1]])
        slow = {"torch", "train_gpt", "scipy", "matplotlib", "jinja2", "numpy"}
        print(code, sorted(slow & sys.modules.keys()))
    """
    done = subprocess.run([sys.executable, "-c", program, folder], cwd=ROOT, capture_output=True,
                          text=True, timeout=300)
    assert done.stdout.splitlines()[-1] == "0 []"
