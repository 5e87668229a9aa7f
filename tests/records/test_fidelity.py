"""The study of ideas on small tracks: its patches fit its script, and its report adds up."""
import csv
import importlib.util
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from frozen_entries import RECORDS, load_script

STUDY = RECORDS / "studies" / "2026-11-30_Fidelity"
TRACKS = ("laptop", "english", "fineweb")


def load(name: str):
    """A module of the study."""
    spec = importlib.util.spec_from_file_location(f"fidelity_{name}", STUDY / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows() -> list[dict]:
    with open(STUDY / "ideas.tsv", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def check_settings(script, track: str, study) -> None:
    """The script accepts the flags of the study's runs, and its tables are consistent."""
    module = load_script(script, "fidelity_script")
    hp = module.parse_arguments([f"--track={track}", *study.FLAGS[track]])
    module.check_hyperparameters(hp, world_size=1)


def test_the_base_has_all_tracks():
    for track in TRACKS:
        check_settings(STUDY / "base.py", track, load("study"))


@pytest.mark.parametrize("row", rows(), ids=lambda row: row["idea"])
def test_each_patch_fits_the_base_and_gives_valid_tables(row, tmp_path):
    """For each track on which the idea is measured."""
    study = load("study")
    base = (STUDY / "base.py").read_text()
    for track in TRACKS:
        if row[track] not in ("in", "out"):
            continue
        args = SimpleNamespace(out=tmp_path, base=STUDY / "base.py", patches=STUDY / "patches")
        script = study.script_of(row["idea"], track, args)
        assert script.read_text() != base
        check_settings(script, track, study)


def test_the_table_names_every_patch():
    named = {row["idea"] for row in rows()}
    assert {path.name.split(".")[0] for path in (STUDY / "patches").iterdir()} == named
    assert len(named) >= 20


def test_a_patch_that_does_not_fit_ends_the_study(tmp_path):
    other = tmp_path / "other.py"
    other.write_text("print(1)\n")
    done = subprocess.run(
        [sys.executable, STUDY / "study.py", "run", "--base", other, "--only", "smear",
         "--tracks", "laptop", "--seeds", "1", "--out", tmp_path / "out"],
        capture_output=True, text=True)
    assert done.returncode
    assert "smear.patch" in done.stderr and "Traceback" not in done.stderr


def test_the_report_finds_planted_gains(tmp_path):
    """Logs in which an idea is worth 10 per cent of the steps, once put in and once taken out."""
    random = np.random.default_rng(0)
    slope = 0.004  # of loss for a per cent of the steps
    points = {"base": 0.0, "shorter": 20 * slope, "useful_in": -10 * slope,
              "useful_out": 10 * slope, "useless": 0.0}
    for seed in range(4):
        level = 1.3 + random.normal(0, 0.1)  # of the seed: cancels in pairs
        for point, difference in points.items():
            log = tmp_path / "laptop" / point / f"seed{seed}.txt"
            log.parent.mkdir(parents=True, exist_ok=True)
            loss = level + difference + random.normal(0, 0.0004)
            log.write_text(f"step:4/8 val_loss:9.0\nstep:8/8 val_loss:{loss:.4f} train_time:1ms\n")
    table = [dict(idea=idea, family="loss", published=published, kind="steps", laptop=direction)
             for idea, published, direction in (
                 ("useful_in", "9", "in"), ("useful_out", "11", "out"), ("useless", "1", "out"))]
    gains = {g["idea"]: g for g in load("report").gains_of("laptop", table, tmp_path)}
    for idea in ("useful_in", "useful_out"):
        assert gains[idea]["gain_percent"] == pytest.approx(10, abs=1)
        assert gains[idea]["gain"] > gains[idea]["margin"]
    assert abs(gains["useless"]["gain_percent"]) < 1
