"""What records/ promises as a folder: READMEs, links, logs, archives, claims."""
import re
import runpy
import sys
import tarfile
from pathlib import Path

import pytest
from frozen_entries import ENTRIES, RECORDS

STUDIES = sorted(str(path.relative_to(RECORDS)) for path in (RECORDS / "studies").iterdir())
LOG_NAME = re.compile(r"\b[a-z]+-\d{8}-\d{6}-[0-9a-f]{6}\.txt\b")


def test_every_entry_and_study_has_a_readme():
    assert len(ENTRIES) >= 7
    index = (RECORDS / "README.md").read_text()
    for folder in ENTRIES + STUDIES:
        readme = RECORDS / folder / "README.md"
        assert readme.exists(), folder
        assert f"({folder}/README.md)" in index, f"records/README.md has no link to {folder}"


STATUS = {"published": "published", "laptop": "measured", "candidates": "predicted"}


@pytest.mark.parametrize("entry", ENTRIES)
def test_readme_begins_with_the_status(entry):
    opening = (RECORDS / entry / "README.md").read_text()[:800].lower()
    assert re.search(rf"\b{STATUS[entry.split('/')[0]]}\b", opening)


def test_links_lead_somewhere():
    """Check each relative link, with its heading if it names one."""
    for page in RECORDS.rglob("*.md"):
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if link.startswith(("http://", "https://")):
                continue
            name, _, heading = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), f"{page}: {link}"
            if heading:
                titles = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
                letters = [re.sub(r"[^\w\- ]", "", title.lower()) for title in titles]
                assert heading in [title.replace(" ", "-") for title in letters], f"{page}: {link}"


@pytest.mark.parametrize("folder", ENTRIES + STUDIES)
def test_named_logs_exist_and_archives_unpack(folder):
    """Logs that a README or table names lie in the folder or in one of its archives."""
    folder = RECORDS / folder
    present = {path.name for path in folder.rglob("*.txt")}
    for path in folder.rglob("*.tar.gz"):
        with tarfile.open(path) as archive:
            members = archive.getmembers()  # reads the archive to its end
        names = [member.name for member in members]
        assert names == sorted(names) and members, path
        assert not any(name.startswith("/") or ".." in name for name in names), path
        present |= {Path(name).name for name in names}
    pages = [path for path in folder.rglob("*") if path.suffix in (".md", ".tsv", ".json")]
    named = {name for page in pages for name in LOG_NAME.findall(page.read_text())}
    assert named <= present


@pytest.mark.slow
@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry.startswith("laptop/")])
def test_laptop_claims_hold(entry, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare", "verify", str(RECORDS / entry)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("tools.compare", run_name="__main__")
    assert ended.value.code == 0, capsys.readouterr().out
