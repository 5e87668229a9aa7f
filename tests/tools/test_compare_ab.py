"""`ab` runs two scripts alternately and continues where it was interrupted."""
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from made_logs import main

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]

# A script that writes a log like the training script's, and notes that it ran.
SCRIPT = '''
import sys, time
from pathlib import Path
folder, name, loss, ms = Path({folder!r}), {name!r}, {loss}, {ms}
seed = int(sys.argv[-1].partition("=")[2])
with open(folder / "order", "a") as file:
    print(name, seed, *sys.argv[1:-1], file=file)
path = folder / f"{{name}}{{seed}}.txt"
print(f"track laptop, 1 x CPU, log {{path}}", flush=True)
lines = [f"# {{name}}", "=" * 100, "Running PyTorch 2.13.0 on CPU with world_size 1", "=" * 100,
         f"step:9/9 val_loss:{{loss + seed / 1e4:.4f}} train_time:{{ms + seed}}ms step_avg:1.00ms"]
path.write_text("\\n".join(lines) + "\\n")
if "--hang" in sys.argv:
    import os
    (folder / "pid").write_text(str(os.getpid()))
    print("hanging", flush=True)
    time.sleep(100_000)
'''


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """A baseline and a faster candidate; ab keeps its state below the folder of both."""
    paths = []
    for name, ms in (("A", 2000), ("B", 1000)):
        path = tmp_path / f"{name}.py"
        path.write_text(SCRIPT.format(folder=str(tmp_path), name=name, loss=3.2, ms=ms))
        paths.append(path)
    monkeypatch.setattr("tools.compare.ab.ROOT", tmp_path)
    handler = signal.getsignal(signal.SIGTERM)
    yield paths
    signal.signal(signal.SIGTERM, handler)


def ran(folder):
    """What ran since the last call: a line for each run."""
    order = folder / "order"
    lines = order.read_text().splitlines() if order.exists() else []
    order.unlink(missing_ok=True)
    return lines


def test_both_scripts_run_alternately_and_complete_runs_are_kept(tmp_path, scripts):
    command = ["ab", *scripts, "--runs", 3]
    flags = ["--", "--track", "laptop"]
    every = [f"{name} {seed} --track laptop" for seed in range(3) for name in "AB"]
    assert main(*command, *flags) == 0 and ran(tmp_path) == every
    assert main(*command, *flags) == 0 and ran(tmp_path) == []
    (tmp_path / "B1.txt").write_text("cut")
    (tmp_path / "A2.txt").unlink()
    assert main(*command, *flags) == 0 and ran(tmp_path) == [every[3], every[4]]
    scripts[1].write_text(scripts[1].read_text() + "# corrected\n")
    assert main(*command, *flags) == 0 and ran(tmp_path) == every[1::2]
    assert main(*command, "--fresh", *flags) == 0 and ran(tmp_path) == every
    assert main(*command, "--", "--track", "fineweb") == 0 and len(ran(tmp_path)) == 6


def test_the_verdict_is_the_exit_code_and_a_failed_script_ends_it(tmp_path, scripts, capsys):
    assert main("ab", *reversed(scripts), "--runs", 3) == 1
    scripts[1].write_text("raise SystemExit(7)")
    capsys.readouterr()
    assert main("ab", *scripts, "--runs", 3) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and str(scripts[1]) in errors and "7" in errors


def test_ctrl_c_ends_the_running_script_too(tmp_path, scripts):
    program = ("import sys; from pathlib import Path; from tools.compare import ab, main; "
               "ab.ROOT = Path(sys.argv[1]); sys.exit(main(sys.argv[2:]))")
    words = [str(tmp_path), "ab", *map(str, scripts), "--runs", "1", "--", "--hang"]
    process = subprocess.Popen([sys.executable, "-c", program, *words], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert any("hanging" in line for line in process.stdout)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130 and errors.count("\n") == 1
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
