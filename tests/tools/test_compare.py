"""records/compare.py on logs built from the description of the public formats, and on our own script's."""
import ast
import dataclasses
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY, TINY
from scipy import stats

from records import compare
from records.compare import logs
from records.compare.groups import group_runs

SEP = "=" * 100
CODE = f'''"""A script.
step:7/7 val_loss:9.9999 train_time:1ms step_avg:1.00ms
"""
import torch
{"#" * 40}
{"-" * 79}
print('=' * 100)
    {SEP}
{"=" * 99}
'''
SMI = """Running Python 3.12.7 (main, Oct 16 2024, 04:37:19) [Clang 18.1.8 ]
Running PyTorch 2.6.0.dev20241203+cu124 compiled for CUDA 12.4
+-----------------------------------------------------------------------------------------+
|   0  NVIDIA H100 80GB HBM3          On  |   00000000:19:00.0 Off |                    0 |
| N/A   30C    P0            117W /  700W |       7MiB /  81559MiB |      0%      Default |
"""


def smi(count, gpu="NVIDIA H100 80GB HBM3"):
    head, rest = SMI.split("|   0", 1)
    row = "|   0" + rest
    return head + "".join(row.replace("|   0", f"|   {i}").replace("NVIDIA H100 80GB HBM3", gpu) for i in range(count))


def running(count, gpu="NVIDIA H100 80GB HBM3"):
    return f"Running PyTorch 2.7.1+cu128 on {gpu} with world_size {count}\n"


def metrics(final=3.2775, steps=20, time_ms=2000.0, restart=False, unit="ms", digits=4, died_at=None, extra=""):
    """Lines as the public scripts print them; restart: the first 10 steps are not timed."""
    lines, each = [], time_ms / (steps - 10 if restart else steps)
    for step in range(steps + 1):
        if died_at is not None and step > died_at:
            break
        ms = each * (step - 10 if restart and step >= 10 else step)
        counted = (step - 10 if restart else step)
        average = "nan" if counted <= 0 else f"{ms / counted:.2f}"
        told = f"{ms:.0f}ms" if unit == "ms" else f"{ms / 1000:.3f}s"
        if step % 5 == 0 and (died_at is None or step < died_at):
            loss = final + (steps - step) * 0.1
            lines.append(f"step:{step}/{steps} val_loss:{loss:.{digits}f} train_time:{told} "
                         f"step_avg:{average}ms{extra}")
        if step < steps:
            lines.append(f"step:{step + 1}/{steps} train_time:{told} step_avg:{average}ms")
    return "\n".join(lines) + "\n"


def log(code=CODE, middle=SMI, body=None, between=()):
    return "".join(part + SEP + "\n" for part in (code, middle, *between)) + (metrics() if body is None else body)


def write(folder, texts, name="{}.txt"):
    folder.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(texts):
        path = folder / name.format(i)
        path.write_bytes(text) if isinstance(text, bytes) else path.write_text(text)
    return str(folder)


def run(*words):
    return subprocess.run([sys.executable, "records/compare.py", *map(str, words)], cwd=REPOSITORY, capture_output=True,
                          text=True)


def rows(*paths):
    done = run("table", "--json", *paths)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def row(*paths):
    (only,) = rows(*paths)
    return only


# ---------------------------------------------------------------------------------------------------------------------
# Reading

LAYOUTS = {
    "main": (log(), 1, "2.6.0.dev20241203+cu124"),
    "running line": (log(middle=running(8)), 8, "2.7.1+cu128"),
    "both running lines": (log(middle="Running PyTorch 2.7.1+cu128 compiled for CUDA 12.8\n" + running(8)), 8,
                           "2.7.1+cu128"),
    "old running line": (log(middle="Running PyTorch 2.5.1\n"), None, "2.5.1"),
    "data loader lines": (log(between=("Training DataLoader: total number of tokens: 100\n",)), 1,
                          "2.6.0.dev20241203+cu124"),
    "leading separator": (SEP + "\n" + log(), 1, "2.6.0.dev20241203+cu124"),
    "leading separator, data loader": (SEP + "\n" + log(between=("Training DataLoader: x\n",)), 1,
                                       "2.6.0.dev20241203+cu124"),
    "code and metrics": (CODE + SEP + "\n" + metrics(), None, None),
    "metrics alone": (metrics(), None, None),
    "lines after": (log() + "peak memory allocated: 38 MiB reserved: 40 MiB\nbye\n", 1, "2.6.0.dev20241203+cu124"),
    "separator and lines after": (log() + SEP + "\nthe end\n", 1, "2.6.0.dev20241203+cu124"),
    "separator in the code": (log(code=CODE + SEP + "\nx = 1\nstep:9/9 val_loss:1.0\n"), 1, "2.6.0.dev20241203+cu124"),
    "windows line ends": (log().replace("\n", "\r\n").encode(), 1, "2.6.0.dev20241203+cu124"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(tmp_path, name):
    text, world_size, torch = LAYOUTS[name]
    found = row(write(tmp_path, [text]))
    assert found["runs"] == 1 and found["steps"] == 20 and found["incomplete"] == found["duplicates"] == 0
    assert found["val_loss_mean"] == pytest.approx(3.2775) and found["train_time_ms_mean"] == 2000
    assert found["step_avg_ms"] == 100 and found["world_size"] == world_size and found["torch"] == torch
    assert (found["code_hash"] is None) == (name == "metrics alone")
    assert (found["gpu"] == "NVIDIA H100 80GB HBM3") == (world_size is not None)
    assert found["val_loss_sd"] is found["p_value"] is found["train_time_ms_sd"] is None


def test_the_layout_does_not_change_the_hash(tmp_path):
    texts = [LAYOUTS[name][0] for name in ("main", "running line", "leading separator", "code and metrics")]
    assert len({row(write(tmp_path / str(i), [text]))["code_hash"] for i, text in enumerate(texts)}) == 1


FORMS = {
    "six digits": metrics(digits=6), "seconds": metrics(unit="s"), "restarts": metrics(restart=True),
    "extra after": metrics(extra=" ema_beta:0 ref_step:2375"),
    "extra before": metrics().replace(" val_loss", " lr:0.1 val_avg_loss:9 val_loss"),
    "target, as it was said": metrics() + "target 3.28: reached at " + metrics().splitlines()[0] + "\n",
    "target, as it is said": metrics() + "target 3.28: reached at step 20 after 2.0 s\n",
    "probes": metrics() + "tailavg step:2720 tau:25 lambda:0.25 val_loss:2.0\n",
}


@pytest.mark.parametrize("name", FORMS)
def test_metric_lines(tmp_path, name):
    found = row(write(tmp_path, [log(body=FORMS[name])]))
    assert found["val_loss_mean"] == pytest.approx(3.2775) and found["train_time_ms_mean"] == pytest.approx(2000)
    assert found["step_avg_ms"] == pytest.approx(200 if name == "restarts" else 100)


def test_time_that_begins_again_is_no_second_run_and_its_first_steps_are_not_timed(tmp_path):
    (found,) = compare.read_log(write(tmp_path, [log(body=metrics(restart=True))]) + "/0.txt")
    assert [step for step, _, _ in found.curve] == [0, 5, 10, 15, 20] and found.restart_step in (10, 11)
    points = compare.curves_of(compare.Group([found], [], []))
    assert [point[4] for point in points] in ([None, None, 0.0, 1000.0, 2000.0], [None, None, None, 1000.0, 2000.0])


def test_nan_times_are_null(tmp_path):
    body = "".join(f"step:{step}/1 val_loss:10.8258 train_time:{step}ms step_avg:nanms\n" for step in (0, 1))
    assert row(write(tmp_path, [log(body=body)]))["step_avg_ms"] is None


def test_a_loss_that_is_nan_is_no_number(tmp_path):
    found = row(write(tmp_path, [log(body=metrics().replace("val_loss:3.2775", "val_loss:nan")), log()]))
    assert found["runs"] == 2 and found["val_loss_mean"] is None and found["p_value"] is None


def test_llm_c_logs_are_read_but_not_guessed(tmp_path):
    lines = ["s:0 tel:11.0", "s:0 trl:10.965596", "s:1 trl:11.0 lr:0.000001 norm:15.37", "s:250 tel:6.3097"]
    found = row(write(tmp_path, ["\n".join(lines) + "\n"]))
    assert found["steps"] is None and found["runs"] == 0 and found["val_loss_mean"] is None
    (last,) = found["incomplete_logs"]
    assert last["last_val_loss"] == 6.3097 and last["last_val_step"] == 250


@pytest.mark.parametrize("died_at", [3, 12, 20])
def test_a_cut_log_has_no_result(tmp_path, died_at):
    """died_at 20: the last training line says step:20/20, but no validation does."""
    found = row(write(tmp_path, [log(body=metrics(died_at=died_at))]))
    assert found["runs"] == 0 and found["incomplete"] == 1 and found["val_loss_mean"] is None
    assert found["train_time_ms_mean"] is None
    assert found["incomplete_logs"][0]["last_val_step"] == {3: 0, 12: 10, 20: 15}[died_at]


def test_several_runs_in_one_file(tmp_path):
    found = row(write(tmp_path, [log(body=metrics(3.27) + metrics(3.28) + metrics(3.29, died_at=7))]))
    assert (found["runs"], found["incomplete"]) == (2, 1) and found["val_loss_mean"] == pytest.approx(3.275)


def test_several_whole_logs_in_one_file(tmp_path):
    other = log(code="import numpy\n", body=metrics(3.5))
    found = rows(write(tmp_path, [log(body=metrics(3.27)) + log(body=metrics(3.28)) + other]))
    assert sorted((r["runs"], r["val_loss_mean"]) for r in found) == [(1, 3.5), (2, pytest.approx(3.275))]


def test_two_scripts_and_three_node_sizes_in_one_folder(tmp_path):
    texts = [log(middle=smi(n), body=metrics(3.27 + n / 1000)) for n in (1, 4, 8)]
    texts += [log(middle=smi(8, "NVIDIA H200"), body=metrics()), log(code=CODE + "# baseline\n", middle=smi(8)),
              log(middle=running(8), body=metrics(3.25)), log(middle=smi(8), body=metrics(steps=25))]
    found = rows(write(tmp_path, texts))
    assert len(found) == 6 and sum(r["runs"] for r in found) == 7
    assert len({r["code_hash"] for r in found}) == 2 and {r["world_size"] for r in found} == {1, 4, 8}
    assert "NVIDIA H200" in {r["gpu"] for r in found} and {r["steps"] for r in found} == {20, 25}


def test_the_same_file_twice_counts_once_and_is_said(tmp_path):
    folder = write(tmp_path, [log(), log(), log(body=metrics(3.28))])
    found = row(folder, folder + "/0.txt")
    assert (found["runs"], found["duplicates"]) == (2, 1) and len(found["duplicate_logs"]) == 1
    assert "duplicate: " in run("table", folder).stdout


def test_files_that_are_no_logs_are_said_where_they_were_named(tmp_path):
    """In a folder other files may lie; but a log that ends before its first step is of a run that failed."""
    folder = write(tmp_path, [log(), log(body="run failed at step 0: OSError\n")])
    write(tmp_path, ["", "Traceback (most recent call last):\n", b"\0\1\2" * 5000, "torch==2.5\n", b"\xff\xfe\xc3\x28"],
          "other{}.txt")
    closed = tmp_path / "closed.txt"
    closed.write_text(log())
    closed.chmod(0)
    done = run("table", folder)
    assert done.returncode == 0 and "other" not in done.stdout and "no step in " + folder + "/1.txt" in done.stdout
    for paths in ([folder, *(f"{folder}/other{i}.txt" for i in range(5))], [f"{folder}/*.txt"]):
        assert all(f"no log: {folder}/other{i}.txt\n" in run("table", *paths).stdout for i in range(5))
    if os.geteuid():  # root reads everything
        assert "can't read" in done.stdout and "closed.txt" in done.stdout
    assert row(folder)["runs"] >= 1


@pytest.mark.parametrize("words, named", [
    (["table", "{}/none.txt"], "none.txt"), (["table", "{}/empty"], "no run"), (["table", "{}/bad.txt"], "bad.txt"),
    (["diff", "{}/packed", "{}/empty"], "tar xzf {}/packed/screening/laptop.tar.gz -C {}/packed"),
    (["bogus"], "bogus"), (["verify", "{}"], "--baseline"), (["extract", "{}/metrics.txt", "-o", "{}/x"], "no code"),
    (["extract", "{}/main.txt", "-o", "{}/none/x"], "none/x"), (["table"], "PATH"),
    (["table", "--jsom", "{}"], "--jsom"),
    (["ab", "train_gpt.py", "train_gpt.py", "--runs", "0"], "--runs is 0"),
    (["runs-needed", "--sd", "0", "--margin", "1"], "--sd"), (["ab", "{}/a.py", "{}/b.py", "--runs", "1"], "a.py"),
    (["plot", "{}/main.txt", "-o", "{}/x.doc"], "doc"),
    (["diff", "train_gpt.py", "records/compare.py"], "diff -u train_gpt.py records/compare.py"),
    (["diff", "train_gpt.py", "{}/main.txt"], "no log: train_gpt.py"), (["diff", "a.py", "b.py"], "there is no a.py")])
def test_mistakes_end_in_one_line(tmp_path, words, named):
    (tmp_path / "empty").mkdir()
    (tmp_path / "packed" / "screening").mkdir(parents=True)
    (tmp_path / "packed" / "screening" / "laptop.tar.gz").touch()
    (tmp_path / "bad.txt").write_bytes(b"\0")
    (tmp_path / "metrics.txt").write_text(metrics())
    (tmp_path / "main.txt").write_text(log())
    done = run(*[word.format(tmp_path) for word in words])
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: "), done.stderr
    assert named.format(*2 * [tmp_path]) in done.stderr


def test_globs_and_single_files(tmp_path):
    folder = write(tmp_path, [log(body=metrics(3.27 + i / 1000)) for i in range(12)])
    assert row(f"{folder}/1*.txt")["runs"] == 3 and row(f"{folder}/1.txt", f"{folder}/2.txt")["runs"] == 2


# ---------------------------------------------------------------------------------------------------------------------
# Statistics

def test_tests_agree_with_scipy_stats():
    a, b = [3.2751, 3.2802, 3.2769, 3.2779], [3.2791, 3.2803, 3.2785]
    assert compare.t_test_below(a, 3.28) == pytest.approx(stats.ttest_1samp(a, 3.28, alternative="less").pvalue)
    welch = stats.ttest_ind(a, b, equal_var=False, alternative="less")
    assert compare.welch_test_below(a, b) == pytest.approx(welch.pvalue)
    assert compare.t_test_below([3.0], 3.28) is None and compare.welch_test_below(a, [3.0]) is None
    assert compare.t_test_below([3.0, 3.0], 3.28) == 0 and compare.t_test_below([3.3, 3.3], 3.28) == 1


def test_runs_needed():
    n = compare.runs_needed(0.0013, 0.001, 0.01)
    def p(n):
        return stats.t.sf(0.001 * math.sqrt(n) / 0.0013, n - 1)
    assert p(n) <= 0.01 < p(n - 1) and n == 13
    more = compare.runs_needed(0.0013, 0.001, 0.01, power=0.8)
    generator = stats.norm.rvs(3.279, 0.0013, size=(4000, more), random_state=0)
    passed = (stats.ttest_1samp(generator, 3.28, axis=1, alternative="less").pvalue < 0.01).mean()
    assert more > n and passed == pytest.approx(0.8, abs=0.04)
    assert f"{n} runs" in run("runs-needed", "--sd", "0.0013", "--margin", "0.001", "--p", "0.01").stdout


def test_table(tmp_path):
    finals, times = [3.2751, 3.2802, 3.2769, 3.2779], [2000, 2010, 2030, 1990]
    write(tmp_path / "slow", [log(body=metrics(f, time_ms=t)) for f, t in zip(finals, times, strict=True)])
    write(tmp_path / "fast", [log(code="import x\n", body=metrics(3.279, time_ms=1000))])
    fast, slow = rows(tmp_path)
    assert slow["val_loss_sd"] == pytest.approx(stats.tstd(finals)) and slow["train_time_ms_mean"] == 2007.5
    assert slow["p_value"] == pytest.approx(stats.ttest_1samp(finals, 3.28, alternative="less").pvalue)
    assert rows("--target", "3.27", tmp_path)[1]["p_value"] > 0.9
    assert (fast["entry"], slow["entry"]) == ("fast", "slow") and slow["path"].endswith("slow")
    text = run("table", tmp_path).stdout
    assert text.index("fast") < text.index("slow") and "\x1b" not in text and "3.2775 ± 0.0021" in text
    markdown = run("table", "--markdown", tmp_path).stdout.splitlines()
    assert markdown[0].startswith("| entry | runs |") and len({line.count("|") for line in markdown[:4]}) == 1


# ---------------------------------------------------------------------------------------------------------------------
# verify, diff, extract, plot

def sample(folder, finals, times, **more):
    return write(folder, [log(**{"code": CODE + f"# {folder.name}\n", **more}, body=metrics(f, time_ms=t))
                          for f, t in zip(finals, times, strict=True)])


GOOD = [3.2771, 3.2781, 3.2775, 3.2779, 3.2768]
OLD_TIMES, NEW_TIMES = [2000, 2004, 2008, 1996, 2001], [1900, 1905, 1898, 1903, 1901]


@pytest.mark.parametrize("name, finals, times, more, broken", [
    ("holds", GOOD, NEW_TIMES, {}, None), ("slower", GOOD, [t + 200 for t in NEW_TIMES], {}, "faster"),
    ("not significant", [3.2771, 3.2901, 3.2675, 3.2879, 3.2768], NEW_TIMES, {}, "mean val loss"),
    ("other hardware", GOOD, NEW_TIMES, {"middle": smi(8)}, "same hardware"),
    ("one seed", [3.2771] * 5, NEW_TIMES, {}, "distinct seeds"),
    ("one run", GOOD[:1], NEW_TIMES[:1], {}, "mean val loss")])
def test_verify(tmp_path, name, finals, times, more, broken):
    old = sample(tmp_path / "old", [f + 0.0001 for f in GOOD], OLD_TIMES)
    done = run("verify", sample(tmp_path / "new", finals, times, **more), "--baseline", old)
    assert done.returncode == (1 if broken else 0), done.stdout + done.stderr
    if broken:
        assert re.search(rf"^FAIL +{broken}", done.stdout, re.M) and "does not hold: " in done.stdout
    else:
        assert "FAIL" not in done.stdout and "ratio 0.9" in done.stdout
    assert re.search("^unknown +same data", done.stdout, re.M)


@pytest.mark.parametrize("minutes, word", [(((0, 2, 4), (1, 3, 5)), "pass"), (((0, 1, 2), (3, 4, 5)), "unknown"),
                                           (((3, 4, 5), (0, 1, 2)), "unknown"), (None, "unknown")])
def test_runs_that_were_not_made_in_turn_are_said(tmp_path, minutes, word):
    """On a machine that others use too, one side after the other compares the hours as well: no failure, but said."""
    for name, times, side in (("old", OLD_TIMES, 0), ("new", NEW_TIMES, 1)):
        texts = []
        for i in range(3):
            facts = {"run_id": f"laptop-20260101-12{minutes[side][i]:02}00-abcdef"} if minutes else {}
            middle = SMI + json.dumps(facts, indent=1) + "\n"
            texts.append(log(code=f"import {name}\n", middle=middle, body=metrics(GOOD[i], time_ms=times[i])))
        write(tmp_path / name, texts)
    told = run("verify", tmp_path / "new", "--baseline", tmp_path / "old").stdout
    assert re.search(f"^{word} +run in turn: ", told, re.M), told
    page = run("report", tmp_path / "old", tmp_path / "new", "-o", tmp_path / "page.html")
    assert page.returncode == 0, page.stderr
    assert ("did not run in turn" in (tmp_path / "page.html").read_text()) == (word != "pass" and minutes is not None)


def test_verify_wants_whole_runs_of_one_script(tmp_path):
    old, new = sample(tmp_path / "old", GOOD, OLD_TIMES), sample(tmp_path / "new", GOOD, NEW_TIMES)
    Path(new, "cut.txt").write_text(log(code=CODE + "# new\n", body=metrics(died_at=12)))
    done = run("verify", new, "--baseline", old)
    assert done.returncode == 1 and re.search("^FAIL +complete runs: candidate.*cut.txt", done.stdout, re.M)
    Path(new, "cut.txt").write_text(log(code="import y\n"))
    done = run("verify", new, "--baseline", old)
    assert done.returncode == 2 and "2 sorts of runs" in done.stderr
    for number in range(30):
        Path(new, f"sort{number}.txt").write_text(log(code=f"import y{number}\n"))
    told = run("verify", new, "--baseline", old).stderr.splitlines()
    assert len({line.partition(": ")[0] for line in told[1:-1]}) == 8  # in what they differ
    assert len(told) == 10 and not any(line.endswith((new, f"{new}/")) for line in told)  # no more of what was refused


def test_verify_of_an_entry_takes_the_logs_in_it_against_those_in_baseline(tmp_path):
    entry = tmp_path / "2030-01-01_New"
    sample(entry, GOOD, NEW_TIMES)
    sample(entry / "baseline", [f + 0.0001 for f in GOOD], OLD_TIMES, code="import old\n")
    sample(entry / "ablation", [3.4], [900], code="import ablation\n")
    done = run("verify", entry)
    assert done.returncode == 0 and "the claim holds" in done.stdout, done.stdout + done.stderr
    assert run("verify", *sorted(entry.glob("*.txt")), "--baseline", entry / "baseline").returncode == 0
    assert run("verify", *sorted(entry.glob("*.txt"))).returncode == 0  # as a shell expands it
    lonely = run("verify", entry / "ablation")
    assert lonely.returncode == 2 and "--baseline is missing" in lonely.stderr


def test_a_log_that_names_no_steps_is_complete_where_it_ends_out_of_turn(tmp_path):
    """As llm.c's do: validations every 250 steps and after the last one."""
    def llm_c(steps, last):
        lines = [f"s:{s} {'trl' if s % 250 else 'tel'}:{4 - s / 5000:.4f}" for s in range(steps)]
        return "\n".join([*lines, *last, ""])
    for name, text, complete in (("whole", llm_c(990, ["s:990 tel:3.3000"]), True), ("cut", llm_c(990, []), False),
                                 ("perhaps", llm_c(1000, ["s:1000 tel:3.3000"]), False)):
        (tmp_path / f"{name}.log").write_text(text)
        (found,) = compare.read_log(str(tmp_path / f"{name}.log"))
        assert found.complete is complete and found.steps == (990 if complete else None)


@pytest.mark.parametrize("script, folder, name", [
    ("records/2030-01-01_New/train_gpt.py", "baseline", "2030-01-01_New"), ("my_idea.py", "scratch", "my_idea"),
    ("train_gpt.py", "2030-01-01_New", "2030-01-01_New"), (None, "scratch", "scratch"),
    ("../idea.py", "scratch", "idea"), (None, "2026-07-17_FP8DownProjection/this_pr",
                                        "2026-07-17_FP8DownProjection/this_pr"),
    ("train_gpt.py", "2030-01-01_New/ablation", "2030-01-01_New/ablation"), (None, "010425_SoftCap", "010425_SoftCap"),
    (None, "mine/logs", "mine/logs"), (None, "mine/fast", "fast")])
def test_a_run_is_named_by_its_script(tmp_path, script, folder, name):
    facts = {} if script is None else {"script": script}
    assert compare.Run(str(tmp_path / folder / "log.txt"), facts=facts).entry == name


def test_no_two_legends_are_alike():
    def group(code="a", gpu="H100", steps=10, **settings):
        facts = {"hyperparameters": settings, "script": "records/2030-01-01_New/train_gpt.py"}
        run = compare.Run("x", code_hash=code, gpu=gpu, world_size=8, steps=steps, facts=facts)
        return compare.Group([run], [], [])
    for others in ([group("b")], [group(gpu="A100")], [group(steps=20)], [group(lr=1.0), group(lr=2.0)],
                   [group("b"), group("b", gpu="A100"), group(lr=1.0)]):
        labels = compare.labels_of([group(lr=0.5), *others])
        assert len(set(labels)) == len(labels) and all(label.startswith("2030-01-01_New") for label in labels), labels
    assert compare.labels_of([group()]) == ["2030-01-01_New"]


def entries(root):
    """Two entries; the second with an ablation of two groups, its baseline by the first's script, and a study."""
    def logs(folder, finals, script, **settings):
        facts = [{"hyperparameters": {"track": "laptop", "seed": seed, **settings}, "target": 3.28, "script": script}
                 for seed in range(len(finals))]
        write(root / folder, [log(code=f"# {script}\n", middle=f"{running(1)}{json.dumps(fact, indent=1)}\n",
                                  body=metrics(final)) for fact, final in zip(facts, finals, strict=True)])
    old, new = ("records/2030-01-01_Old/train_gpt.py", "records/2030-02-02_New/train_gpt.py")
    logs("2030-02-02_New", GOOD, new, ngrams=6, muon_lr=0.1)
    logs("2030-02-02_New/ablation", [3.4], new, ngrams=1, muon_lr=0.1)
    logs("2030-02-02_New/ablation/more", [3.5], new, ngrams=1, muon_lr=0.2)
    logs("2030-02-02_New/baseline", [f + 0.001 for f in GOOD], old)
    logs("studies/2030-03-03_Study", [3.2] * 6, "other.py")
    return str(root)


def test_the_table_is_the_entries_claims_a_line_each(tmp_path):
    root = entries(tmp_path)
    lines = run("table", root).stdout.splitlines()
    assert [line.split()[0] for line in lines[:4] if line] == ["entry", "2030-01-01_Old", "2030-02-02_New"]
    assert "3 other groups of runs" in lines[-1] and "--all" in lines[-1]
    assert sum("not all rows were run in turn" in line for line in lines) == 1
    everything = run("table", "--all", root).stdout
    assert "run in turn" not in everything
    for name in ("2030-02-02_New, ngrams 1 ", "2030-02-02_New, ngrams 1, muon_lr 0.2 ", "2030-03-03_Study "):
        assert name in everything, everything
    assert sorted(row["label"] for row in rows(root) if row["claim"]) == ["2030-01-01_Old", "2030-02-02_New"]
    assert "track" not in everything
    write(tmp_path / "2030-04-04_Public", [log()])
    assert run("table", root).stdout.splitlines()[0].split()[:2] == ["entry", "track"]


def test_an_entrys_claim_rests_on_its_own_runs_not_on_those_made_as_anothers_baseline(tmp_path):
    root = Path(entries(tmp_path))
    own = (tmp_path / "2030-02-02_New/baseline").glob("*.txt")
    (tmp_path / "2030-01-01_Old").mkdir()
    for path in list(own)[:3]:
        (tmp_path / "2030-01-01_Old" / path.name).write_text(path.read_text().replace('"seed": ', '"seed": 1'))
    claims = {row["label"]: row["runs"] for row in rows(str(root)) if row["claim"]}
    assert claims == {"2030-01-01_Old": 3, "2030-02-02_New": len(GOOD)}
    assert "2030-01-01_Old, in 2030-02-02_New" in run("table", "--all", str(root)).stdout


def group_of(folder, facts, code=CODE, **more):
    """The group of a log that tells these facts."""
    write(folder, [log(code=code, middle=f"{running(1)}{json.dumps(facts, indent=1)}\n", **more)])
    return compare.Group(compare.read_log(str(folder / "0.txt")), [], [])


@pytest.mark.parametrize("facts, tokens", [
    ({}, 8 * 256), ({"stage_tokens": [4096, 4096]}, 4096), ({"stage_tokens": [2048, 4096]}, None),
    ({"stage_tokens": "abc"}, None), ({"stage_tokens": [10**400]}, None), ({"stage_tokens": [[1], [1]]}, None),
    ({"hyperparameters": {"batch_size": 8, "sequence_length": 256, "extension_steps": 40}}, None)])
def test_tokens_of_a_script_without_stages(tmp_path, facts, tokens):
    group = group_of(tmp_path, {"hyperparameters": {"batch_size": 8, "sequence_length": 256}, **facts})
    assert group.tokens_before(20) == (tokens and 20 * tokens)


SOURCE = (REPOSITORY / "train_gpt.py").read_text()


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("flags", [["--track=fineweb"], ["--track=laptop"], ["--track=fineweb", "--extension_steps=0"],
                                   ["--track=fineweb", "--num_steps=7", "--extension_steps=3", "--batch_size=5"]])
def test_tokens_of_a_run_in_stages_are_those_of_train_gpt(tmp_path, flags, told):
    """Also of the first logs, which do not tell stage_tokens."""
    from train_gpt import parse_arguments, stage_ends, tokens_before
    hp = parse_arguments(flags)
    facts = {"hyperparameters": dataclasses.asdict(hp)}
    if told:
        facts["stage_tokens"] = [stage.batch * hp.batch_size * hp.sequence_length for stage in hp.stages]
    group = group_of(tmp_path, facts, SOURCE)
    steps = {0, 1, hp.num_steps // 2, hp.num_steps, *(end + more for end in stage_ends(hp) for more in (-1, 0, 1))}
    for step in filter(lambda step: 0 <= step <= hp.num_steps, steps):
        assert group.tokens_before(step) == tokens_before(step, hp)
    assert not told or hp.track == "laptop" or "--extension_steps=0" in flags or len(group.stages) == 5


TABLE = re.search(r"^STAGES = \{\n.*?\n\n", SOURCE, re.M | re.S)[0]
HOSTILE = {
    "no table": "STAGES = 5\n", "a call": "STAGES = open('hacked', 'w')\n", "two tables": TABLE + TABLE,
    "changed later": TABLE + "STAGES['laptop'] = ()\n", "cut": TABLE[:200] + "\n\n",
    "a name": TABLE.replace("1 / 3", "x"), "no row": "STAGES = {'laptop': ()}\n",
    "a division by zero": TABLE.replace("1 / 3", "1 / 0"), "no number": TABLE.replace("1 / 3", "None"),
    "an infinite end": TABLE.replace("1 / 3", "math.inf"), "not a number": TABLE.replace("1 / 3", "1e999 / 1e999"),
    "ends that fall": TABLE.replace("1 / 3", "0.9"), "half a batch": TABLE.replace("2 / 3,    2,", "2 / 3,    2.5,"),
    "a side effect": TABLE.replace("1 / 3", "open('hacked', 'w')"), "unpacked": TABLE.replace("1 / 3", "*[1 / 3]"),
    "a comprehension": "STAGES = {track: (Stage(1.0, 1),) for track in TRACKS}\n",
    "other rows": TABLE.replace("Stage(", "Part("), "parentheses": f"STAGES = {'(' * 8_000}\n",
    "signs": f"STAGES = {{'laptop': {'-' * 16_000}1}}\n", "names": f"STAGES = {{'laptop': x{'.x' * 8_000}}}\n",
    "quotients": f"STAGES = {{'laptop': (Stage(1{'/1' * 7_500}, 1),) * 2}}\n", "in a comment": "# STAGES\n",
    "a huge table": f"STAGES = {{'laptop': {'-' * 9_000_000}1}}\n", "text": '"""\nSTAGES\n"""\n'}


@pytest.mark.parametrize("name", HOSTILE)
def test_tokens_of_stages_that_cannot_be_read_are_not_told(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    code = SOURCE.replace(TABLE, HOSTILE[name])
    assert code != SOURCE
    settings = {"track": "fineweb", "num_steps": 20, "extension_steps": 2, "batch_size": 8, "sequence_length": 256}
    group = group_of(tmp_path / "logs", {"hyperparameters": settings}, code)
    assert group.stages is None and group.tokens_before(20) is None and not (tmp_path / "hacked").exists()
    for words in (["table", "logs"], ["report", "logs", "-o", "page.html"]):
        assert compare.main(words) == 0


@pytest.mark.parametrize("change", [
    {"stage_tokens": [2048, 4096, 6144, 6144, 9999]}, {"stage_tokens": [2048, 4096]}, {"num_steps": 1},
    *({name: value} for name in ("num_steps", "extension_steps", "batch_size")
      for value in (None, "abc", [1], 1e400, 10**400))])
def test_tokens_of_stages_whose_log_tells_otherwise_are_not_told(tmp_path, change):
    settings = {"track": "fineweb", "num_steps": 20, "extension_steps": 2, "batch_size": 8, "sequence_length": 256}
    facts = {"hyperparameters": settings, "stage_tokens": [2048, 4096, *[6144] * 3]}
    assert group_of(tmp_path / "right", facts, SOURCE).tokens_before(20) == 2048 * (6 + 2 * 6 + 3 * 8)
    facts = {**facts, **change} if "stage_tokens" in change else {"hyperparameters": {**settings, **change}}
    assert group_of(tmp_path / "wrong", facts, SOURCE).stages is None


def test_tokens_of_the_entries():
    """As the READMEs of the record and of the study tell them."""
    def last(folder):
        (group,) = group_runs([run for path in sorted((REPOSITORY / "records" / folder).glob("*.txt"))
                               for run in compare.read_log(str(path))])
        return group.tokens_before(group.any.steps)
    assert last("2026-11-22_NGramEmbed") == 390 * 2048 and last("2026-11-25_Stages") == 348_160  # 0.80 and 0.35 M
    assert last("studies/2026-11-25_English/final/new") == 598_016
    assert last("studies/2026-11-25_English/short/new") == 352_256
    assert row(REPOSITORY / "records/2026-11-25_Stages" / "*.txt")["tokens_to_target"] == 348_160


def test_the_table_is_at_most_120_columns_wide(tmp_path):
    for number in range(3):
        facts = {"hyperparameters": {name * 20: number for name in "abcdef"}, "target": 3.28}
        write(tmp_path / f"{'long_name_' * 15}{number}\u202e", [
            log(middle=running(8, "GPU " * 30) + json.dumps(facts, indent=1) + "\n", body=metrics(3.27 + number))])
    done = run("table", tmp_path)
    assert done.returncode == 0 and max(map(len, done.stdout.splitlines()[:4])) <= 120 and "\u202e" not in done.stdout
    assert max(map(len, run("table", "--all", tmp_path).stdout.splitlines())) > 120


@pytest.mark.parametrize("change, code", [(0.0, 0), (0.01, 1), (-0.01, 0)])
def test_verify_systems_only(tmp_path, change, code):
    base = [3.2951, 3.3102, 3.3069, 3.2979, 3.3033]  # not significant, which is waived
    old, new = (sample(tmp_path / name, [f + more for f in base], times) for name, more, times in
                (("old", 0.00011, OLD_TIMES), ("new", 2 * change, NEW_TIMES)))
    assert run("verify", new, "--baseline", old, "--systems-only").returncode == code
    assert run("verify", new, "--baseline", old).returncode == 1


def with_seeds(folder, finals, seeds, steps=16):
    """A folder of logs that tell their seeds."""
    folder.mkdir()
    for seed, final in zip(seeds, finals, strict=True):
        facts = json.dumps({"hyperparameters": {"seed": seed, "num_steps": steps}}, indent=1)
        text = log(middle=f"Running Python 3.11\nRunning PyTorch 2.13 on a CPU with world_size 1\n{facts}\n",
                   body=metrics(final))
        (folder / f"{seed}.txt").write_text(text)
    return str(folder)


def test_the_losses_of_both_sides_are_compared(tmp_path):
    """Against scipy.stats: paired where the seeds are the same, Welch's where they are not; two-sided."""
    from scipy import stats
    a, b = [3.279, 3.271, 3.275, 3.268], [3.282, 3.276, 3.2755, 3.275]
    old = with_seeds(tmp_path / "old", b, range(4))
    for name, seeds, p in (("same", range(4), stats.ttest_rel(a, b).pvalue),
                           ("other", range(1, 5), stats.ttest_ind(a, b, equal_var=False).pvalue)):
        lines = run("verify", with_seeds(tmp_path / name, a, seeds), "--baseline", old).stdout.splitlines()
        told = next(line for line in lines if line.startswith("final val loss:"))
        assert "candidate 3.2732 ± 0.0048 (n = 4), baseline 3.2771 ± 0.0033 (n = 4): -0.0039, no difference shown" in told
        assert f"p = {p:.2g}: {'paired by seed, 4 pairs' if name == 'same' else 'Welch'}" in told
    one = run("verify", with_seeds(tmp_path / "one", [3.29], [0]), "--baseline", old).stdout
    assert "+0.0129, worse (not tested: a test needs 2 runs of each, and a spread)" in one


def test_losses_are_compared_at_equal_steps_too(tmp_path):
    runs = {name: compare.Run(name, steps=steps, curve=curve) for name, steps, curve in (
        ("new", 10, [(0, 10.0, 0), (5, 4.0, 1), (10, 3.0, 2)]), ("old", 20, [(0, 10.0, 0), (5, 5.0, 1), (20, 3.1, 2)]))}
    groups = [compare.Group([runs[name]], [], []) for name in ("new", "old")]
    final, equal = compare.comparison(*groups)
    assert "-0.1000, better" in final and equal.startswith("val loss at step 5: ") and "-1.0000, better" in equal
    assert len(compare.comparison(groups[0], groups[0])) == 1  # of equal length: the end says it


def test_diff(tmp_path):
    a = sample(tmp_path / "a", [3.28, 3.27, 3.275], [100, 300, 200], code="import torch\nx = 1\n\ny  =  2\n")
    b = sample(tmp_path / "b", [3.26], [150], code="import torch\nx = 3\ny = 2\n", middle=smi(8))
    done = run("diff", a, b)
    assert done.returncode == 0 and "-x = 1\n+x = 3\n" in done.stdout and "\n y = 2\n" in done.stdout  # white space
    assert "a/2.txt" in done.stdout  # the typical run: of the median time
    assert "val_loss: 3.2750 ± 0.0050 (n = 3) -> 3.2600\n" in done.stdout and "world_size: 1 -> 8" in done.stdout
    assert "final val loss: B 3.2600 (n = 1), A 3.2750 ± 0.0050 (n = 3): -0.0150, better (not tested" in done.stdout
    assert "the code is the same" in run("diff", a, a).stdout


def test_diff_shows_one_seed_on_both_sides_and_says_what_it_leaves_out(tmp_path):
    a, b = (with_seeds(tmp_path / name, finals, seeds) for name, finals, seeds in (
        ("a", [3.28, 3.27, 3.29], (0, 1, 2)), ("b", [3.26, 3.25, 3.27], (2, 1, 5))))
    done = run("diff", a, b)
    shown = re.findall(r"^(?:---|\+\+\+) .*/(\d)\.txt", done.stdout, re.M)
    assert shown[0] == shown[1] and "note:" not in done.stdout
    Path(b, "other.txt").write_text(log(code="import y\n"))
    assert re.search(r"^note: .*/b holds 2 sorts of runs; shown is the fastest", run("diff", a, b).stdout, re.M)


@pytest.mark.parametrize("code", [CODE, "import x", "import x\n", "# é\r\nimport y\n\n"])
def test_extract_gives_the_code_back(tmp_path, code):
    """Byte for byte; where the script had no last line break, our logs' hash tells."""
    import hashlib
    data = code.encode()
    facts = json.dumps({"code_hash": hashlib.sha256(data).hexdigest()[:12]}, indent=1)
    text = code + ("" if code.endswith("\n") else "\n") + SEP + "\n" + f"{running(1)}{facts}\n{SEP}\n{metrics()}"
    (tmp_path / "log.txt").write_bytes(text.encode())
    assert run("extract", tmp_path / "log.txt", "-o", tmp_path / "out.py").returncode == 0
    assert (tmp_path / "out.py").read_bytes() == data


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_plot(tmp_path, suffix):
    """Also of more groups than there are colours, with names that are long or mean something to TeX."""
    folders = [sample(tmp_path / name, GOOD, times) for name, times in (("old", OLD_TIMES), ("new", NEW_TIMES))]
    folders += [sample(tmp_path / f"{'long name ' * 9}$x_{{{i}$", [3.2, 3.3], [1000, 1001 + i]) for i in range(9)]
    done = run("plot", *folders, "-o", tmp_path / f"curves.{suffix}")
    assert done.returncode == 0, done.stderr
    data = (tmp_path / f"curves.{suffix}").read_bytes()
    assert data.startswith(b"\x89PNG") if suffix == "png" else b"<svg" in data


# ---------------------------------------------------------------------------------------------------------------------
# Our own logs

def test_our_own_logs(sandbox):
    for seed in (0, 1):
        done = sandbox(f"--seed={seed}")
        assert done.returncode == 0, done.stderr
    found = row(sandbox.path / "records/scratch")
    assert found["runs"] == 2 and found["steps"] == 6 and found["target"] == 1.1 and found["world_size"] == 1
    assert found["val_loss_sd"] > 0 and found["train_time_ms_mean"] > 0
    first = next((sandbox.path / "records/scratch").glob("*.txt"))
    assert run("extract", first, "-o", sandbox.path / "out.py").returncode == 0
    assert (sandbox.path / "out.py").read_bytes() == (sandbox.path / "train_gpt.py").read_bytes()


def test_a_resumed_run_is_one_run(sandbox):
    assert sandbox("--save_every=3").returncode == 0
    checkpoint = next((sandbox.path / "records/scratch").glob("*_step000003.pt"))
    whole = row(sandbox.path / "records/scratch")
    assert sandbox("--save_every=3", f"--resume={checkpoint}").returncode == 0
    found = row(sandbox.path / "records/scratch")
    assert (found["runs"], found["incomplete"]) == (1, 0) and found["val_loss_mean"] == whole["val_loss_mean"]
    (only,) = compare.read_log(str(next((sandbox.path / "records/scratch").glob("*.txt"))))
    assert [step for step, _, _ in only.curve] == [3, 6]


@pytest.mark.parametrize("fact", ["target", "script", "code_hash", "run_id", "hyperparameters", "threads",
                                  "data_fingerprint", "batch_size", "val_every"])
@pytest.mark.parametrize("value", ["abc", 5, None, [1], {"a": 1}, 1e400])
def test_facts_of_the_wrong_type_end_in_a_result(tmp_path, capsys, fact, value):
    facts = {"target": 3.28, "hyperparameters": {"batch_size": 8, "sequence_length": 1024}}
    (facts["hyperparameters"] if fact in ("batch_size", "val_every") else facts)[fact] = value
    text = f"{CODE}\n{SEP}\n{running(1)}{json.dumps(facts, indent=1)}\n{SEP}\n{metrics()}"
    (tmp_path / "a.txt").write_text(text)
    for command in (["table"], ["table", "--json"], ["verify", "--baseline", tmp_path],
                    ["report", "-o", tmp_path / "page.html"]):
        code = compare.main([*command[:1], str(tmp_path), *map(str, command[1:])])
        assert code in (0, 1) and not capsys.readouterr().err, command


def test_ab_goes_on_where_it_was_interrupted(sandbox):
    """A and B in turn; a run that is there already is not run again."""
    root = sandbox.path
    (root / "records").mkdir(exist_ok=True)
    shutil.copy(REPOSITORY / "records/compare.py", root / "records/compare.py")
    shutil.copytree(REPOSITORY / "records/compare", root / "records/compare")
    (root / "b.py").write_text((root / "train_gpt.py").read_text() + "\n# B\n")

    command = [sys.executable, "records/compare.py", "ab", "train_gpt.py", "b.py", "--runs", "2"]

    def start(args):
        return subprocess.run([*command, "--", "--track=laptop", *args], cwd=root, capture_output=True, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
    flags = [*TINY, "--val_every=0", "--log_every=0"]
    done = start(flags)
    assert done.returncode == 1 and "FAIL" in done.stdout, done.stderr  # an untrained model meets no target
    order = re.findall(r"^--- run (\d) of 4.*: ([AB]), seed (\d):", done.stdout, re.M)
    assert order == [("1", "A", "0"), ("2", "B", "0"), ("3", "A", "1"), ("4", "B", "1")]
    assert re.search(r"run 4 of 4, about \d+ (s|minutes) left", done.stdout)
    assert re.search(r"final val loss: .*n = 2.*: \+0\.0000, equal \(not tested: paired by seed, 2 pairs", done.stdout)
    logs = sorted((root / "records/scratch").glob("*.txt"))
    assert len(logs) == 4
    for path in logs:  # a script that sets itself another target
        which = "B" if "\n# B\n" in path.read_text() else "A"
        (root / which).mkdir(exist_ok=True)
        (root / which / path.name).write_text(path.read_text().replace('"target": 1.1', '"target": 9.1')
                                              if which == "B" else path.read_text())
    verdict = run("verify", root / "B", "--baseline", root / "A").stdout
    assert re.search("^FAIL +same target: 9.1 and 1.1", verdict, re.M)
    again = start(flags)
    assert "kept, for their script and flags are the same: A seed 0, B seed 0, A seed 1, B seed 1" in again.stdout
    assert "--- run" not in again.stdout
    next(p for p in logs if p.read_text().endswith("\n") and '"seed": 1' in p.read_text()).write_text("cut")
    again = start(flags)
    assert len(re.findall(r"^--- .*: [AB], seed 1:", again.stdout, re.M)) == 1 and "seed 0:" not in again.stdout
    assert len(re.findall("^pass +complete runs", again.stdout, re.M)) == 2  # what was cut is not counted
    next(p for p in logs if p.exists() and '"seed": 0' in p.read_text()).unlink()
    assert len(re.findall(r"^--- .*: [AB], seed 0:", start(flags).stdout, re.M)) == 1
    (root / "b.py").write_text((root / "b.py").read_text() + "# mended\n")
    assert re.findall(r"^--- run (\d) of 4.*: ([AB]), seed", start(flags).stdout, re.M) == [("3", "B"), ("4", "B")]
    # Ctrl-C ends the running script too, at once: without a checkpoint, which nothing would go on from
    process = subprocess.Popen([*command, "--fresh", "--", "--track=laptop", *flags, "--num_steps=100000"], cwd=root,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "warmed up" in line:
            break
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=20)
    assert process.returncode == 130 and errors.startswith("interrupted;") and "Traceback" not in out + errors
    assert not subprocess.run(["pgrep", "-f", "num_steps=100000"], capture_output=True).stdout
    assert not list((root / "records/scratch").glob("*.pt"))
    command += ["--fresh"]
    assert "kept" not in (anew := start(flags).stdout) and anew.count("--- run") == 4


def test_what_changes_no_number_splits_no_group():
    from train_gpt import MAY_CHANGE
    assert MAY_CHANGE <= compare.HARMLESS


def test_a_resume_is_seen_though_its_line_names_other_runs():
    """As it did on 2026-11-28: else what a run does again after it would count as another run."""
    for rest in (b"", b"; other runs with checkpoints there: laptop-1"):
        metrics = compare.logs.Metrics()
        for line in (b"step:9/12 val_loss:2.0 train_time:9ms step_avg:1.00ms", b"resumed from a.pt at step 6" + rest,
                     b"step:9/12 val_loss:2.0 train_time:9ms step_avg:1.00ms"):
            metrics.feed(line)
        assert len(metrics.runs) == 1


def test_imports_no_torch_and_nothing_slow(tmp_path):
    modules = [REPOSITORY / "records/compare.py", *Path(compare.__file__).parent.glob("*.py")]
    imported = {alias.name.split(".")[0] for module in modules for node in ast.walk(ast.parse(module.read_text()))
                if isinstance(node, (ast.Import, ast.ImportFrom))
                for alias in (node.names if isinstance(node, ast.Import) else [ast.alias(node.module or ".")])}
    assert "torch" not in imported and "train_gpt" not in imported
    folder = write(tmp_path, [log(body=metrics(f)) for f in GOOD])
    program = ("import sys; from records import compare; compare.main(['table', sys.argv[1]]); "
               "print(*{'torch', 'train_gpt', 'scipy.stats', 'matplotlib'} & sys.modules.keys())")
    done = subprocess.run([sys.executable, "-c", program, folder], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0 and "3.2775 ± 0.0005" in done.stdout, done.stderr
    assert done.stdout.endswith("\n\n"), "slow to import: " + done.stdout.splitlines()[-1]


def test_each_log_is_opened_once_and_read_twice_at_most(tmp_path, monkeypatch):
    """Once for its lines, and its code for the hash. 100 logs of 160 KB."""
    body = "\n".join(f"step:{s}/2000 train_time:{s * 50}ms step_avg:50.00ms" for s in range(1, 2001))
    folder = write(tmp_path, [log(code=CODE + f"x = {'1' * 70}\n" * 800, body=f"{body}\nstep:2000/2000 "
                                  f"val_loss:3.{i:03d} train_time:100000ms step_avg:50.00ms\n") for i in range(100)])
    files = []

    class Counted(io.BufferedReader):
        """A file that adds up the bytes read from it."""

        def __init__(self, path, mode):
            assert mode == "rb"
            super().__init__(io.FileIO(path))
            self.path, self.bytes = path, 0
            files.append(self)

        def counted(self, data):
            self.bytes += len(data)
            return data
        read = lambda self, *size: self.counted(super(Counted, self).read(*size))
        readline = lambda self, *size: self.counted(super(Counted, self).readline(*size))

    monkeypatch.setattr(logs, "open", Counted, raising=False)
    assert len(logs.find_runs([folder])[0]) == 100
    assert len(files) == len({file.path for file in files}) == 100
    assert all(file.bytes <= 2 * os.path.getsize(file.path) for file in files)
