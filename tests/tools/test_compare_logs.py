"""Reading logs: every public layout, every form of metric lines, cut, damaged, resumed logs."""
import gzip
import hashlib
import json
import os
import random

import pytest
from made_logs import (
    CODE,
    FORMS,
    H100,
    LAYOUTS,
    SEPARATOR,
    TORCH,
    facts,
    llm_c,
    log,
    main,
    metrics,
    running,
    smi,
    write,
)

from tools import compare


def rows(capsys, *paths):
    """What `table --json` prints."""
    assert main("table", "--json", *paths) == 0
    return json.loads(capsys.readouterr().out)


def row(capsys, *paths):
    (only,) = rows(capsys, *paths)
    return only


def read(folder, text):
    """The runs in a log with this text."""
    return compare.read_log(write(folder, [text]) + "/0.txt")


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_is_read(tmp_path, name):
    text, world_size, torch = LAYOUTS[name]
    (run,) = read(tmp_path, text)
    assert run.complete and run.steps == 20 and run.world_size == world_size and run.torch == torch
    assert (run.val_loss, run.train_time_ms, run.step_avg_ms) == (3.2775, 2000, 100)
    assert (run.code_hash is None) == (name == "metrics alone")
    assert run.gpu == (H100 if world_size else None)


@pytest.mark.parametrize("name", FORMS)
def test_each_form_of_metric_lines_is_read(tmp_path, name):
    (run,) = read(tmp_path, log(body=FORMS[name]))
    assert run.complete and run.val_loss == 3.2775 and run.train_time_ms == pytest.approx(2000)
    assert run.step_avg_ms == (200 if name == "restarts" else 100)


def test_a_resumed_run_is_one_run_also_with_windows_line_ends(tmp_path):
    """The steps after the checkpoint are repeated, and their last values count."""
    first = "".join(f"step:{step}/6 val_loss:{9 - step}.0 train_time:{step}00ms step_avg:1.00ms\n"
                    for step in range(6))
    second = ("step:4/6 val_loss:5.5 train_time:410ms step_avg:1.00ms\n"
              "step:6/6 val_loss:3.0 train_time:610ms step_avg:1.00ms\n")
    for rest in ("", "; other runs with checkpoints there: laptop-1"):
        text = log(body=f"{first}resumed from /a/b_step000003.pt at step 3{rest}\n{second}")
        for ends in ("\n", "\r\n"):
            (run,) = read(tmp_path, text.replace("\n", ends))
            assert run.complete and run.restart_step == 0 and run.train_time_ms == 610
            curve = [(step, loss) for step, loss, _ in run.curve]
            assert curve == [(0, 9), (1, 8), (2, 7), (3, 6), (4, 5.5), (6, 3)]


@pytest.mark.parametrize("second, change, complete", [
    ("1 x AMD EPYC, 1 threads", "setting changed: val_every was 5, now 6", True),
    ("2 x AMD EPYC, 1 threads", "2 x AMD EPYC", False),
    ("1 x AMD EPYC, 1 threads", "setting changed: muon_lr was 0.045, now 0.05", False),
    ("1 x AMD EPYC, 1 threads", "torch changed: was 2.11.0, now 2.13.0", False)])
@pytest.mark.parametrize("name", ["log", "log:"])
def test_a_run_that_changed_when_it_was_resumed_is_no_result(tmp_path, capsys, name, second, change,
                                                             complete):
    def begin(machine):
        return f"track laptop, 6 steps, bfloat16, {machine}, {name} /a/x.txt\n"

    body = (begin("1 x AMD EPYC, 1 threads")
            + "step:3/6 val_loss:5.0 train_time:300ms step_avg:1.00ms\n"
            + begin(second) + f"resumed from /a/x_step000003.pt at step 3\n{change}\n"
            + "step:6/6 val_loss:3.0 train_time:600ms step_avg:1.00ms\n")
    folder = write(tmp_path, [log(body=body)])
    found = row(capsys, folder)
    assert (found["runs"], found["incomplete"]) == ((1, 0) if complete else (0, 1))
    main("table", folder)
    assert (change in capsys.readouterr().out) == (not complete)
    (first, second) = read(tmp_path / "two", log(body=begin("1 x A") + metrics() + begin("2 x A")
                                                + metrics()))  # two runs, none of them resumed
    assert first.complete and second.complete


def part(body, machine="1 x A100, 1 threads", resumed_at=None, changes=()):
    """The lines of a run, or of a part of it, from its start or resume on."""
    lines = [f"track laptop, 6 steps, bfloat16, {machine}, log: /a/x.txt"]
    if resumed_at is not None:
        lines.append(f"resumed from /a/x_step{resumed_at:06d}.pt at step {resumed_at}")
    return "".join(f"{line}\n" for line in [*lines, *changes]) + body


def steps(*numbers):
    return "".join(f"step:{n}/6 val_loss:{9 - n}.0 train_time:{n}00ms step_avg:1.00ms\n"
                   for n in numbers)


TWO_RANKS = "2 x A100, 1 threads"


@pytest.mark.parametrize("parts, complete", [
    # What was tried from step 3 on is undone by a resume from step 3, but not by one from step 5.
    ([part(steps(4, 5), TWO_RANKS, 3), part(steps(4, 5, 6), resumed_at=3)], True),
    ([part(steps(4, 5), TWO_RANKS, 3), part(steps(6), resumed_at=5)], False),
    ([part(steps(4, 5), TWO_RANKS, 3), part(steps(6), TWO_RANKS, 5)], False),
    ([part(steps(4, 5), TWO_RANKS, 3), part(steps(1, 6), resumed_at=0)], True),
    # It was killed before its first metric line; or after a checkpoint, before one.
    ([part("", TWO_RANKS, 3), part(steps(6), resumed_at=3)], True),
    ([part("", TWO_RANKS, 3), part(steps(6), resumed_at=5)], False),
    ([part(steps(4), resumed_at=3, changes=["activations changed: was a, now b"]),
      part(steps(6), resumed_at=3)], True),
    ([part(steps(4), resumed_at=3, changes=["world_size changed: was 1, now 2"]),
      part(steps(6), resumed_at=4)], False),
    ([part(steps(6), resumed_at=3, changes=["device changed: was A100, now H100"])], False),
    ([part(steps(6), resumed_at=3, changes=["setting changed: device was cuda, now cpu"])], True)])
def test_of_a_run_that_was_resumed_twice_the_parts_count_that_led_to_its_end(tmp_path, parts,
                                                                             complete):
    text = log(body=part(steps(0, 1, 2, 3)) + "".join(parts))
    for ends in ("\n", "\r\n"):
        (run,) = read(tmp_path, text.replace("\n", ends))
        assert run.complete == complete and run.last_step == 6


def test_a_resumed_run_whose_first_part_lies_in_another_log_tells_its_changes(tmp_path):
    for changes in ([], ["torch changed: was 2.11.0, now 2.13.0"]):
        (run,) = read(tmp_path, log(body=part(steps(6), resumed_at=3, changes=changes)))
        assert run.complete == (not changes)


@pytest.mark.parametrize("cut, complete", [
    ("val_loss:3.2775", False), ("val_loss:3.27", False), ("train_time:2000", False),
    ("train_time:2000ms step_avg:100.00ms", True)])
def test_a_number_that_is_cut_at_the_end_of_the_file_does_not_count(tmp_path, cut, complete):
    text = log()
    end = text.rindex(cut) + len(cut)
    (run,) = read(tmp_path, text[:end])
    assert run.complete == complete and run.val_loss == (3.2775 if complete else None)


# Files that a log can become on its way.
WAYS = {
    "CRLF": lambda data: data.replace(b"\n", b"\r\n"),
    "byte order mark": lambda data: b"\xef\xbb\xbf" + data,
    "PowerShell": lambda data: data.replace(b"\n", b"\r\n").decode().encode("utf-16"),
    "UTF-16 without a mark": lambda data: data.decode().encode("utf-16-le"),
    "gzip": gzip.compress,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("public", [True, False])
def test_the_way_of_a_log_changes_nothing_and_a_copy_counts_once(tmp_path, capsys, way, public):
    code = '"""naïve"""\nimport torch\n'
    environment = smi() if public else facts(target=1.1, run_id="laptop-1", script="naïve.py")
    data = log(code=code, environment=environment).encode()
    before = row(capsys, write(tmp_path / "before", [data]))
    folder = write(tmp_path / "after", [WAYS[way](data)])
    after = row(capsys, folder)
    for name in ("code_hash", "gpu", "target", "val_loss_mean", "train_time_ms_mean"):
        assert after[name] == before[name]
    write(tmp_path / "after", [data], name="copy.log")
    both = row(capsys, folder)
    assert (both["runs"], both["duplicates"]) == (1, 1)
    assert main("extract", f"{folder}/0.txt", "-o", tmp_path / "out.py") == 0
    assert (tmp_path / "out.py").read_text() == code


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_the_hash_in_the_log_decides_which_line_ends_the_script_had(tmp_path, ends):
    script = "import torch\nx = 1\n".replace("\n", ends).encode()
    environment = facts(code_hash=hashlib.sha256(script).hexdigest()[:12])
    text = log(code="import torch\nx = 1\n", environment=environment)
    for way in (text, text.replace("\n", "\r\n")):
        folder = write(tmp_path, [way])
        assert main("extract", f"{folder}/0.txt", "-o", tmp_path / "out.py") == 0
        assert (tmp_path / "out.py").read_bytes() == script


def test_a_compressed_log_is_found_in_a_folder_and_a_damaged_one_is_named(tmp_path, capsys):
    folder = write(tmp_path, [log(body=metrics(3.27))])
    packed = gzip.compress(log(body=metrics(3.28)).encode())
    write(tmp_path, [packed], name="packed.txt.gz")
    assert row(capsys, folder)["runs"] == 2
    for damaged in (packed[:-100], packed[:200] + b"x" * 50 + packed[250:]):
        write(tmp_path, [damaged], name="packed.txt.gz")
        assert main("table", folder) == 0
        assert "packed.txt.gz" in capsys.readouterr().out


def test_a_copy_inside_a_longer_file_counts_once_but_equal_losses_do_not_make_a_copy(tmp_path,
                                                                                  capsys):
    first, second = log(body=metrics(3.27)), log(body=metrics(3.28))
    folder = write(tmp_path / "copies", [first, first + second])
    found = row(capsys, folder)
    assert (found["runs"], found["duplicates"]) == (2, 1)
    other_time = log(body=metrics(3.27, time_ms=2001.0))
    folder = write(tmp_path / "same seed", [first, other_time])
    found = row(capsys, folder)
    assert (found["runs"], found["duplicates"]) == (2, 0)


def test_a_byte_that_is_not_utf8_costs_no_setting(tmp_path):
    data = log(environment=facts(target=1.1, platform="caf-")).encode().replace(b"caf-", b"caf\xe9")
    (run,) = read(tmp_path, data)
    assert run.target == 1.1


def test_links_are_followed_once_and_what_is_no_file_is_not_read(tmp_path, capsys):
    disk = write(tmp_path / "disk", [log(body=metrics(3.27))])
    folder = tmp_path / "records"
    write(folder / "2030-01-01_New", [log(body=metrics(3.28))])
    (folder / "scratch").symlink_to(disk)
    (folder / "again").symlink_to(disk)
    (folder / "Above").symlink_to(folder)
    (folder / "Latest").symlink_to("2030-01-01_New")  # sorted before the folder itself
    (folder / "one.txt").symlink_to(f"{disk}/0.txt")
    os.mkfifo(folder / "pipe.txt")  # to read it would wait for ever
    found = rows(capsys, folder)
    assert sum(r["runs"] for r in found) == 2 and not any(r["duplicates"] for r in found)
    assert "2030-01-01_New" in {r["entry"] for r in found}
    for link in ("scratch", "Latest"):
        assert row(capsys, folder / link)["runs"] == 1
    (folder / "lost.txt").symlink_to("nowhere")
    assert main("table", folder) == 0
    out = capsys.readouterr().out
    assert "lost.txt" in out and "pipe.txt" in out


@pytest.mark.parametrize("environment, tokens", [
    ({}, 8 * 256), ({"stage_tokens": [4096, 4096]}, 4096), ({"stage_tokens": [2048, 4096]}, None),
    ({"stage_tokens": "abc"}, None), ({"stage_tokens": [10**400]}, None),
    ({"stage_tokens": [[1], [1]]}, None), ({"hyperparameters": {}}, None),
    ({"hyperparameters": {"batch_size": 8, "sequence_length": 256, "extension_steps": 40}}, None)])
def test_tokens_come_from_the_lines_or_from_equal_stages(tmp_path, environment, tokens):
    environment = {"hyperparameters": {"batch_size": 8, "sequence_length": 256}, **environment}
    (run,) = read(tmp_path, log(environment=facts(**environment)))
    assert run.tokens_before(20) == (tokens and 20 * tokens)
    (run,) = read(tmp_path, log(environment=facts(**environment), body=metrics(tokens=100)))
    assert run.tokens_before(20) == 2000


@pytest.mark.slow
def test_the_layout_does_not_change_the_hash(tmp_path):
    names = ("main", "running line", "leading separator", "code and metrics")
    hashes = {read(tmp_path, LAYOUTS[name][0])[0].code_hash for name in names}
    assert len(hashes) == 1


@pytest.mark.slow
def test_a_time_that_begins_again_is_no_second_run_and_its_first_steps_are_not_timed(tmp_path):
    (run,) = read(tmp_path, log(body=metrics(restart=True)))
    assert [step for step, _, _ in run.curve] == [0, 5, 10, 15, 20]
    times = [point.ms for point in compare.curves_of(compare.Group([run], [], []))]
    assert times[:2] == [None, None] and times[3:] == [1000, 2000]


@pytest.mark.slow
@pytest.mark.parametrize("died_at, last_step", [(3, 0), (12, 10), (20, 15)])
def test_a_cut_log_has_no_result(tmp_path, capsys, died_at, last_step):
    """If it died at 20, the last training line says step:20/20, but there is no validation."""
    found = row(capsys, write(tmp_path, [log(body=metrics(died_at=died_at))]))
    assert (found["runs"], found["incomplete"]) == (0, 1)
    assert found["val_loss_mean"] is None and found["train_time_ms_mean"] is None
    assert found["incomplete_logs"][0]["last_val_step"] == last_step


@pytest.mark.slow
@pytest.mark.parametrize("text, steps", [
    (llm_c(990, ["s:990 tel:3.3000"]), 990), (llm_c(990), None),
    (llm_c(1000, ["s:1000 tel:3.3"]), None)])
def test_a_log_of_unknown_length_is_complete_if_it_ends_between_validations(tmp_path, text, steps):
    (run,) = read(tmp_path, text)
    assert run.steps == steps and run.complete == (steps is not None)


@pytest.mark.slow
def test_several_runs_and_several_logs_in_one_file(tmp_path, capsys):
    body = metrics(3.27) + metrics(3.28) + metrics(3.29, died_at=7)
    found = row(capsys, write(tmp_path, [log(body=body)]))
    assert (found["runs"], found["incomplete"]) == (2, 1)
    assert found["val_loss_mean"] == pytest.approx(3.275)
    other = log(code="import numpy\n", body=metrics(3.5))
    text = log(body=metrics(3.27)) + log(body=metrics(3.28)) + other
    found = rows(capsys, write(tmp_path, [text]))
    groups = sorted((r["runs"], round(r["val_loss_mean"], 6)) for r in found)
    assert groups == [(1, 3.5), (2, 3.275)]


@pytest.mark.slow
def test_scripts_hardware_torch_versions_and_lengths_are_kept_apart(tmp_path, capsys):
    texts = [log(environment=smi(n), body=metrics(3.27 + n / 1000)) for n in (1, 4, 8)]
    texts += [log(environment=smi(8, "NVIDIA H200")), log(environment=running(8, torch=TORCH)),
              log(code=f"{CODE}# baseline\n", environment=smi(8)),
              log(environment=smi(8), body=metrics(steps=25)),
              log(environment=smi(8, torch="2.11.0"))]
    found = rows(capsys, write(tmp_path / "public", texts))
    # Public logs of two torch versions share a row; those of this project do not.
    assert len(found) == 6 and sum(r["runs"] for r in found) == 8
    assert any(TORCH in r["torch"] and "2.11.0" in r["torch"] for r in found if r["torch"])
    ours = [log(environment=facts(hyperparameters={}).replace("2.7.1", version))
            for version in ("2.11.0", "2.13.0")]
    assert len(rows(capsys, write(tmp_path / "ours", ours))) == 2
    assert len({r["code_hash"] for r in found}) == 2
    assert {r["world_size"] for r in found} == {1, 4, 8}


@pytest.mark.slow
def test_a_log_that_is_there_twice_counts_once(tmp_path, capsys):
    folder = write(tmp_path, [log(), log(), log(body=metrics(3.28))])
    found = row(capsys, folder, f"{folder}/0.txt")
    assert (found["runs"], found["duplicates"]) == (2, 1) and len(found["duplicate_logs"]) == 1


@pytest.mark.slow
def test_files_that_are_no_logs_are_reported_if_they_were_named(tmp_path, capsys):
    """Other files may lie in a folder; but a log without a step is of a run that failed."""
    folder = write(tmp_path, [log(), log(body="run failed at step 0: OSError\n")])
    others = ["", "Traceback:\n", b"\0\1\2" * 5000, "torch==2.5\n", b"\xff\xfe\xc3\x28"]
    write(tmp_path, others, "other{}.txt")
    assert main("table", folder) == 0
    out = capsys.readouterr().out
    assert "other" not in out and f"{folder}/1.txt" in out
    assert main("table", folder, *(f"{folder}/other{i}.txt" for i in range(5))) == 0
    out = capsys.readouterr().out
    assert all(f"{folder}/other{i}.txt" in out for i in range(5))


@pytest.mark.slow
def test_globs_and_single_files(tmp_path, capsys):
    folder = write(tmp_path, [log(body=metrics(3.27 + i / 1000)) for i in range(12)])
    assert row(capsys, f"{folder}/1*.txt")["runs"] == 3
    assert row(capsys, f"{folder}/1.txt", f"{folder}/2.txt")["runs"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", [
    "target", "script", "code_hash", "run_id", "hyperparameters", "threads", "data_fingerprint",
    "command", "batch_size", "val_every", "seed"])
@pytest.mark.parametrize("value", ["abc", 5, None, [1], {"a": 1}, 1e400, 10**400])
def test_facts_of_the_wrong_type_end_in_a_result(tmp_path, capsys, name, value):
    environment = {"target": 3.28, "hyperparameters": {"batch_size": 8, "sequence_length": 1024}}
    inside = name in ("batch_size", "val_every", "seed")
    (environment["hyperparameters"] if inside else environment)[name] = value
    folder = write(tmp_path, [log(environment=facts(**environment))])
    for words in (["table", folder], ["table", "--json", folder],
                  ["verify", folder, "--baseline", folder]):
        assert main(*words) in (0, 1) and not capsys.readouterr().err


@pytest.mark.slow
def test_damaged_logs_end_in_a_result_or_in_one_line(tmp_path, capsys):
    right = log(environment=facts(target=3.28)).encode()
    numbers = random.Random(1)
    start = right.rindex(SEPARATOR.encode())
    cuts = [0, 1, 99, start, start + 100, start + 101, start + 150, len(right) - 1]
    cases = [right[:n] for n in cuts] + [right[n:] for n in cuts]
    cases += [right * 3, right[start:] * 3, right[::-1]]
    for _ in range(100):
        data = bytearray(right)
        for _ in range(5):
            data[numbers.randrange(len(data))] = numbers.randrange(256)
        cases.append(bytes(data))
    for data in cases:
        folder = write(tmp_path, [data])
        for flag in ("--all", "--json", "--markdown"):
            code = main("table", flag, folder)
            errors = capsys.readouterr().err
            assert code == 0 or (code == 2 and errors.count("\n") == 1 and folder in errors)
