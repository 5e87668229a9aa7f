"""launch.py: which track, how many processes and shards; what it says of mistakes and of a failed run."""
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed.run
from conftest import REPOSITORY, TINY
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import launch
import train_gpt
from data.fineweb import VARIANTS
from data.shards import write_shard

ADAMW = "2024-06-06_AdamW"


@pytest.fixture
def started(monkeypatch):
    """launch.main(words) on a machine with so many GPUs, but nothing is fetched or trained: what would be."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "argv", ["launch.py"])
    for name in ("NPROC", "SHARDS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("STARTED_BY", "")  # so that what launch.py puts there is gone after the test
    monkeypatch.setattr(launch, "page", lambda hp: "")  # no run, no page
    seen = SimpleNamespace(fetched=None, words=None, processes=0, code=None)

    def fetch(track, shards):
        seen.fetched = (track, shards)
        return 0

    def train(words):
        seen.words, seen.processes = words, 1
        return 0

    def torchrun(arguments):
        seen.processes = int(re.fullmatch(r"--nproc_per_node=(\d+)", arguments[1])[1])
        seen.words = arguments[3:]

    def start(*words, gpus=0, **variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        seen.code = launch.main(list(words))
        return seen

    monkeypatch.setattr(launch, "fetch", fetch)
    monkeypatch.setattr(launch, "reads_beyond", lambda module, hp: False)
    monkeypatch.setattr(train_gpt, "main", train)
    monkeypatch.setattr(torch.distributed.run, "main", torchrun)
    yield start
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("words, gpus, track, processes, said", [
    ([], 0, "laptop", 1, "GPUs to run on: 0;"),
    ([], 8, "fineweb", 8, "GPUs to run on: 8;"),
    ([], 1, "fineweb", 1, "GPUs to run on: 1;"),
    (["--device", "cpu"], 8, "laptop", 1, "GPUs to run on: 0;"),
    (["--device=cpu", "--track=fineweb"], 8, "fineweb", 1, ""),
    (["--track", "laptop"], 8, "laptop", 8, ""),
    (["--track=fineweb"], 0, "fineweb", 1, ""),
])
def test_track_and_processes(started, capsys, words, gpus, track, processes, said):
    run = started(*words, gpus=gpus)
    assert run.code == 0 and run.processes == processes and run.fetched[0] == track
    assert train_gpt.parse_arguments(run.words).track == track
    assert run.words == [*([] if "track" in str(words) else ["--track", track]), *words]
    out = capsys.readouterr().out
    assert said in out if said else not out
    assert sys.argv == ["train_gpt.py", *run.words]


def test_number_of_processes_and_their_threads(started, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert started(NPROC="").processes == 1  # empty is unset
    assert started(NPROC="2").processes == 2 and os.environ["OMP_NUM_THREADS"] == "6"
    assert started(OMP_NUM_THREADS="5").processes == 2 and os.environ["OMP_NUM_THREADS"] == "5"
    assert started(NPROC="1", gpus=8).processes == 1


def test_shards_at_least(started):
    """As many shards of 10^8 tokens as the run has tokens, or SHARDS; a run that needs more than all has all."""
    full = 16_384 * 8 * (483 + 2 * 484 + 3 * (483 + 40))  # thirds of the 1,450 scheduled steps, then the extension
    assert started("--track=fineweb").fetched == ("fineweb", -(-full // 10**8)) == ("fineweb", 4)
    assert started("--track=fineweb", "--num_steps=100").fetched == ("fineweb", 1)
    assert started("--track=fineweb", "--num_steps=1000000").fetched == ("fineweb", 103)
    assert VARIANTS["10B"].num_train_shards == launch.ALL_SHARDS == 103
    assert started("--track=fineweb", SHARDS="2").fetched == ("fineweb", 2)
    assert started().fetched[0] == "laptop"
    constant = SimpleNamespace(num_steps=200, step_tokens=10**6)
    assert launch.shards_at_least(SimpleNamespace(), constant) == 2
    staged = SimpleNamespace(tokens_before=lambda step, hp: 3 * step * hp.step_tokens)
    assert launch.shards_at_least(staged, constant) == 6


READS = "--track=fineweb --num_steps=12 --extension_steps=3 --batch_size=1 --sequence_length=2048".split()


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """shelf(lengths, size): a hub that has documents of these lengths in shards of that size. What launch.py fetches
    comes from it into the track's folder; .asked: the numbers of shards that it was asked for."""
    monkeypatch.setattr(train_gpt, "ROOT", tmp_path)
    shelf = SimpleNamespace(asked=[], folder=tmp_path / "data/fineweb10B", shards=[])

    def fetch(track, shards):
        shelf.asked.append(shards)
        for number, tokens in enumerate(shelf.shards[:shards], 1):
            path = shelf.folder / f"fineweb_train_{number:06d}.bin"
            path.exists() or write_shard(path, tokens)
        return 0 if shards <= len(shelf.shards) else 2

    def make(lengths, size):
        tokens = np.concatenate([[50_256, *range(length - 1)] for length in lengths])
        shelf.shards = np.split(tokens, range(size, len(tokens), size))
        monkeypatch.setattr(launch, "TOKENS_A_SHARD", size)
        monkeypatch.setattr(launch, "ALL_SHARDS", len(shelf.shards))
        return shelf

    monkeypatch.setattr(launch, "fetch", fetch)
    return make


def reads(hp):
    """What a run's loader reads of the shards that are there: all its tokens, and the place of the last one."""
    track, places = train_gpt.TRACKS[hp.track], []
    stream = train_gpt.TokenStream(track.train_files, track, 1)
    read = stream.read
    stream.read = lambda start, count: places.append(start + count) or read(start, count)
    loader = train_gpt.BatchLoader(stream, hp, train_gpt.Runtime(0, 1, torch.device("cpu")))
    tokens = torch.cat([t for _ in range(hp.num_steps) for t, _ in loader.next()])
    assert max(places) <= len(stream)  # nothing is read twice
    return tokens, max(places) - 1


@pytest.mark.parametrize("size", [11_000, 23_456, 60_000])
def test_shards_are_counted(shelf, size):
    """One shard more is fetched until a run of all stages finds its documents; and none that it does not read."""
    lengths = np.random.RandomState(0).randint(1, 4000, size=100)  # cut at 896 and 2,048: most have tails
    hp, hub = train_gpt.parse_arguments(READS), shelf(lengths, size)
    assert {train_gpt.stage_index(step, hp) for step in range(12)} == {0, 1, 2, 4}  # 3 is empty
    assert launch.bring(train_gpt, hp, None) == 0
    least, counted = -(-2048 * (3 + 2 * 3 + 3 * 6) // size), hub.asked[-1]
    assert least < counted < launch.ALL_SHARDS and hub.asked == list(range(least, counted + 1))
    tokens, last = reads(hp)
    assert last // size + 1 == counted
    hub.asked.clear()
    assert launch.bring(train_gpt, hp, None) == 0 and hub.asked == [least]  # all there: asked once
    assert launch.bring(train_gpt, hp, 2) == 0 and hub.asked[-1] == 2  # SHARDS=2
    launch.fetch("fineweb", launch.ALL_SHARDS)
    assert torch.equal(tokens, reads(hp)[0])  # shards that lie beside change nothing


def test_shards_are_counted_to_the_token(shelf):
    """The seventh shard ends with the last target of the run, in the middle of a document; or just before it."""
    lengths, hp = np.random.RandomState(1).randint(100, 3000, size=100), train_gpt.parse_arguments(READS)
    hub = shelf(lengths, 10**6)
    launch.fetch("fineweb", 1)
    wanted, last = reads(hp)
    ends = np.cumsum(lengths)
    assert last % 7 == 6 and min(abs(ends - last)) > 100
    for size, counted in (((last + 1) // 7, 7), (last // 7, 8)):
        shutil.rmtree(hub.folder)
        hub = shelf(lengths, size)
        assert launch.bring(train_gpt, hp, None) == 0 and hub.asked[-1] == counted < launch.ALL_SHARDS
        assert torch.equal(reads(hp)[0], wanted)


def test_a_run_longer_than_all_shards_reads_them_again(shelf):
    hub, hp = shelf([600] * 100, 10_000), train_gpt.parse_arguments(READS)
    assert launch.bring(train_gpt, hp, None) == 0 and hub.asked == [6]
    hub.asked.clear()
    (hub.folder / "fineweb_train_000006.bin").unlink()
    assert launch.bring(train_gpt, train_gpt.parse_arguments([*READS, "--num_steps=10"]), None) == 0
    assert hub.asked == [5, 6]  # 43,008 tokens, and what is dropped


def test_a_fetch_that_fails_is_not_repeated(shelf, monkeypatch):
    hub, hp = shelf([600] * 10, 1000), train_gpt.parse_arguments(READS)
    monkeypatch.setattr(launch, "ALL_SHARDS", 60)  # the hub has 6
    assert launch.bring(train_gpt, hp, None) == 2 and hub.asked == [56]
    monkeypatch.setattr(launch, "TOKENS_A_SHARD", 12_000)
    assert launch.bring(train_gpt, hp, None) == 2 and hub.asked == [56, 5, 6, 7]


def test_without_cut_documents_nothing_is_counted(monkeypatch):
    """Nor for another track or an older script: no data is read."""
    monkeypatch.setattr(train_gpt, "TokenStream", lambda *args: pytest.fail("read the data"))
    hp = train_gpt.parse_arguments(READS)
    assert not launch.reads_beyond(SimpleNamespace(), hp)
    assert not launch.reads_beyond(train_gpt, train_gpt.parse_arguments(["--track=laptop"]))
    uncut = tuple(stage._replace(document=0) for stage in hp.stages)
    monkeypatch.setitem(train_gpt.STAGES, "fineweb", uncut)
    assert not launch.reads_beyond(train_gpt, hp)


@pytest.mark.parametrize("word, near", [("tset", "./run.sh test?"), ("simulat", "./run.sh simulate?"),
                                        ("my_idea.py", "--help")])
def test_a_word_that_is_no_command_is_one_line(started, monkeypatch, capsys, word, near):
    monkeypatch.setattr(launch, "load", lambda script: pytest.fail("loaded it"))
    with pytest.raises(SystemExit) as ended:
        started(word, "--num_steps=3")
    errors = capsys.readouterr().err
    assert ended.value.code == 2 and errors.count("\n") == 1 and f"'{word}'" in errors and near in errors


def test_a_prompt_needs_no_data_and_one_process(started, capsys):
    run = started("--prompt=The", "--resume", "latest", gpus=8)
    assert run.code == 0 and run.processes == 1 and run.fetched is None and not capsys.readouterr().out
    assert run.words == ["--prompt=The", "--resume", "latest"]


@pytest.mark.parametrize("words, variables, named", [
    (["--bogus=1"], {}, ["--bogus=1", "--help"]),
    (["--bogus=1"], {"NPROC": "2"}, ["--bogus=1", "--help"]),
    (["--track"], {}, ["--track"]),
    (["--track=moon"], {}, ["moon", "fineweb", "laptop"]),
    (["--num_steps=0"], {}, ["--num_steps"]),
    ([], {"NPROC": "3"}, ["8 sequences", "3 ranks"]),
    ([], {"NPROC": "0"}, ["NPROC is '0'", "NPROC=2 ./run.sh"]),
    ([], {"NPROC": "two"}, ["NPROC is 'two'", "NPROC=2 ./run.sh"]),
    ([], {"SHARDS": "-1"}, ["SHARDS is '-1'", "SHARDS=2 ./run.sh"]),
])
def test_mistakes_are_one_line_before_anything_is_fetched(started, monkeypatch, capsys, words, variables, named):
    fetched = []
    monkeypatch.setattr(launch, "fetch", lambda *args: fetched.append(args))
    run = started(*words, **variables)
    errors = capsys.readouterr().err
    assert run.code == 2 and not fetched and run.processes == 0
    assert errors.startswith("error: ") and errors.count("\n") == 1
    assert all(name in errors for name in named), errors


def test_a_failed_fetch_ends_the_run(started, monkeypatch):
    monkeypatch.setattr(launch, "fetch", lambda *args: 2)
    run = started()
    assert run.code == 2 and run.processes == 0


@pytest.mark.parametrize("words", [["--record", "nowhere"], ["--record=nowhere"], ["--record"],
                                   ["--record=studies"], ["--record", ".."], ["--record", f"../records/{ADAMW}"],
                                   ["--record", ADAMW, "--record", "nowhere"]])
def test_an_unknown_entry_lists_the_entries(started, capsys, words):
    with pytest.raises(SystemExit) as ended:
        started(*words)
    errors = capsys.readouterr().err
    entries = sorted(path.parent.name for path in (REPOSITORY / "records").glob("*/train_gpt.py"))
    assert ended.value.code == 2 and errors.count("\n") == 1
    assert f"--record is '{words[-1].removeprefix('--record').lstrip('=')}'" in errors
    assert errors.rstrip().endswith("expected one of: " + " ".join(entries)) and ADAMW in entries


def test_a_record_is_its_own_script_on_the_track_of_this_machine(started, monkeypatch):
    """Its own default is fineweb, also without a GPU."""
    script = f"records/{ADAMW}/train_gpt.py"
    module = launch.load(script)
    assert os.path.samefile(module.__file__, script)
    seen = []
    module.main = lambda words: seen.append(words) or 0
    monkeypatch.setattr(launch, "load", lambda path: module if path == script else pytest.fail(path))
    assert started("--seed=3", "--record", ADAMW).code == 0
    assert seen == [["--track", "laptop", "--seed=3"]] and sys.argv == [script, *seen[0]]
    run = started(f"--record={ADAMW}/", gpus=8)  # as a shell completes it
    assert run.processes == 8 and run.words == ["--track", "fineweb"]
    assert run.fetched == ("fineweb", 50)  # 9,536 steps of 524,288 tokens


@pytest.mark.parametrize("words", [["--help"], ["--track=laptop", "-h"]])
def test_help_is_the_scripts(started, monkeypatch, words):
    seen = []
    monkeypatch.setattr(train_gpt, "main", lambda words: seen.append(words) or 0)
    run = started(*words)
    assert seen == [words] and run.fetched is None and sys.argv[0] == "train_gpt.py"


def test_python_without_the_packages(started, monkeypatch, capsys):
    def load(script):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")
    monkeypatch.setattr(launch, "load", load)
    with pytest.raises(SystemExit) as ended:
        started()
    errors = capsys.readouterr().err
    assert ended.value.code == 2 and errors.count("\n") == 1
    assert "'torch'" in errors and "unset PYTHON" in errors and "requirements.txt" in errors


def failed(**codes):
    """What torchrun raises when the ranks r0, r1, ... ended with these exit codes, r0 first."""
    return ChildFailedError("train_gpt.py", {int(name[1:]): ProcessFailure(int(name[1:]), 1, code, "<none>")
                                             for name, code in codes.items()})


@pytest.mark.parametrize("error, code, lines", [
    (failed(r1=-9), 137, ["rank 1 was killed by signal 9"]),
    (failed(r0=-15, r1=-9), 137, ["rank 1 was killed by signal 9"]),  # torchrun ended rank 0
    (failed(r0=-15, r1=-15), 143, ["rank 0 was killed by signal 15", "rank 1 was killed by signal 15"]),
    (failed(r0=2), 2, []),  # the script has said it
    (failed(r0=2, r1=-15), 2, []), (failed(r0=-15, r1=2), 2, []),  # torchrun ended the other one
    (failed(r0=2, r1=143), 2, []), (failed(r0=143, r1=-9), 137, ["rank 1 was killed by signal 9"]),  # it heeded it
    (failed(r0=3, r1=3), 3, []),
    (SignalException("stopped", signal.SIGINT), 130, []),
])
def test_a_failed_run_in_several_processes(started, monkeypatch, capsys, error, code, lines):
    def torchrun(arguments):
        raise error
    monkeypatch.setattr(torch.distributed.run, "main", torchrun)
    assert started("--track=laptop", NPROC="2").code == code
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(lines) and all(line in text for line, text in zip(lines, said, strict=True))
    assert all("--resume latest" in text for text in said)


def test_fetch_is_the_modules_command_in_another_process(monkeypatch):
    import data.fineweb
    import data.laptop
    here = os.getpid()
    monkeypatch.setattr(data.laptop, "main", lambda words: os.getpid() == here or bool(words))
    monkeypatch.setattr(data.fineweb, "main", lambda words: 0 if words == ["--shards", "7"] else 2)
    assert launch.fetch("laptop", 7) == 0 and launch.fetch("fineweb", 7) == 0 and launch.fetch("fineweb", 8) == 2
    assert launch.fetch("mine", 7) == 0
    monkeypatch.setattr(data.laptop, "main", lambda words: os.kill(os.getpid(), signal.SIGKILL))
    assert launch.fetch("laptop", 1) == 128 + 9


IS_THERE = "def main(words):\n    return 0\n"  # data/laptop.py of a corpus that is there


def begin(sandbox, *flags, laptop=IS_THERE, **variables):
    """run.sh on the sandbox's corpus, in a process group of its own, as a terminal would start it."""
    for name in ("run.sh", "launch.py"):
        shutil.copy(REPOSITORY / name, sandbox.path)
    (sandbox.path / "data/laptop.py").write_text(laptop)
    return subprocess.Popen(["bash", "run.sh", *flags], cwd=sandbox.path, text=True, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "NPROC": "1",
                                 "CUDA_VISIBLE_DEVICES": "", **variables})


def test_a_run_is_that_of_the_script_by_itself(sandbox):
    """The same log, but for times and names: source, command, settings, hashes, losses."""
    process = begin(sandbox, *TINY, "--seed=3")
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0 and not errors and "GPUs to run on: 0;" in out, errors
    (first,) = (sandbox.path / "records/scratch").glob("*.txt")
    done = subprocess.run([sys.executable, "train_gpt.py", "--track", "laptop", *TINY, "--seed=3"], text=True,
                          cwd=sandbox.path, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    (second,) = set((sandbox.path / "records/scratch").glob("*.txt")) - {first}

    def without_times(log):
        text = log.read_text().replace(log.stem, "RUN_ID")
        text = re.sub(r"(train_time|step_avg|tokens_per_second|peak_memory_per_rank):\S+", r"\1", text)
        return re.sub(r"(compiled|warmed up) in \S+ s", r"\1", text)
    assert without_times(first) == without_times(second) and '"train_gpt.py"' in first.read_text()


@pytest.mark.parametrize("processes", ["1", "2"])
def test_ctrl_c_ends_a_run_with_a_checkpoint(sandbox, processes):
    process = begin(sandbox, *TINY, "--num_steps=5000", "--val_every=0", NPROC=processes)
    while "step:3/" not in (line := process.stdout.readline()):
        assert line, process.communicate()
    os.killpg(process.pid, signal.SIGINT)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "run ended by SIGINT at step" in out, errors
    (path,) = (sandbox.path / "records/scratch").glob("*.pt")
    assert "Traceback" not in errors and f"go on with: NPROC={processes} ./run.sh --resume {path}\n" in out


def test_a_run_goes_on_without_a_track(sandbox):
    """Where there is a GPU, too: not fineweb, but the track of the checkpoint."""
    process = begin(sandbox, "--track=laptop", *TINY, "--save_every=3")
    assert process.communicate(timeout=300) and process.returncode == 0
    process = begin(sandbox, "--resume=latest")
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0 and "resumed from" in out and "choose with --track" not in out, errors


def test_a_rank_that_fails_alone_ends_the_node_with_its_own_line(sandbox):
    """Only rank 0 writes a log; the other one waits for it in a collective by then."""
    (sandbox.path / "records/taken").write_text("a file where the log's folder should be")
    process, begun = begin(sandbox, "--track=laptop", *TINY, "--entry=taken", NPROC="2"), time.monotonic()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and errors.splitlines()[-1].startswith("error: can't write the log"), errors
    assert "Traceback" not in errors and time.monotonic() - begun < 60


def test_a_rank_that_fails_is_not_held_by_what_python_does_at_its_exit(tmp_path):
    """There threads of gloo aborted it (exit code 134, seen once in CI), and other threads are waited for."""
    program = textwrap.dedent(f"""
        import atexit, os, threading, time
        import torch.distributed as dist
        import train_gpt
        def fail():
            dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1)
            atexit.register(os.abort)
            threading.Thread(target=time.sleep, args=(100,)).start()
            raise train_gpt.UserError("mine")
        raise SystemExit(train_gpt.run_as_program(fail))
        """)
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, text=True, capture_output=True, timeout=90)
    assert (done.returncode, done.stderr) == (2, "error: mine\n")


def test_a_rank_other_than_0_that_fails_alone_ends_the_node_with_its_own_line(sandbox):
    """Rank 1 of 2 alone reads the sequence with the impossible token, while rank 0 is in the step's collectives."""
    path, length, step = sandbox.path / "data/laptop/laptop_train_000002.bin", 256, 4
    order = np.random.RandomState(0).permutation((6000 - 1) // length)
    bad = next(i for i in range(2 * step + 1, 12, 2) if order[i] * length > 3000)  # in the second of two shards
    tokens = np.array(train_gpt.open_shard(path))
    tokens[order[bad] * length + 9 - 3000] = 300
    write_shard(path, tokens)
    process, begun = begin(sandbox, "--track=laptop", *TINY, "--num_steps=12", NPROC="2"), time.monotonic()
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and errors.splitlines()[-1].startswith(f"error: {path} holds the token id"), errors
    assert "Traceback" not in errors and f"step:{bad // 2}/" in out and time.monotonic() - begun < 60


def test_an_interrupted_fetch_ends_in_one_line(sandbox):
    """Ctrl-C in a terminal goes to both processes."""
    process = begin(sandbox, "--track=laptop", laptop=(
        "import time\n\ndef main(words):\n    print('fetching', flush=True)\n    time.sleep(60)\n"))
    assert process.stdout.readline() == "fetching\n"
    interrupted = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors == "interrupted\n" and time.monotonic() - interrupted < 30


def test_a_run_ends_with_the_command_for_its_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hp = train_gpt.parse_arguments(["--track=laptop"])
    assert launch.page(hp) == ""
    for number, name in enumerate(["scratch/laptop-1", "scratch/laptop-2", "scratch/fineweb-3", "2030-01-01_A/laptop-4",
                                   "2031-01-01_B/fineweb-5", "2030-02-02_C/ablation/laptop-6"]):
        path = tmp_path / "records" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (number, number))
    assert shlex.split(launch.page(hp))[1:] == ["records/compare.py", "report", "records/2030-01-01_A",
                                                "records/scratch/laptop-2.txt", "-o", "records/scratch/laptop-2.html"]
