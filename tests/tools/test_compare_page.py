"""The page that `report` writes: what is on it, and that the text of a log can do nothing there."""
import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from made_logs import (
    FORMS,
    LAYOUTS,
    LOSSES,
    NEW_TIMES,
    OLD_TIMES,
    facts,
    llm_c,
    log,
    main,
    metrics,
    write,
    write_entries,
    write_runs,
)

pytestmark = pytest.mark.slow
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
VOID = {"meta", "img"}


class Page(HTMLParser):
    """A parsed page: tags (name, attributes), and the text inside each kind of element."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.texts = {}
        self.open = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.texts.setdefault(tag, []).append("")
        if tag not in VOID:
            self.open.append((tag, len(self.texts[tag]) - 1))

    def handle_endtag(self, tag):
        while self.open and self.open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        for tag, number in self.open:
            self.texts[tag][number] += data

    def values(self, name):
        """The values of an attribute, over all tags."""
        return [attributes[name] for _, attributes in self.tags if name in attributes]


def report(*paths, out):
    """The parsed page about some logs."""
    assert main("report", *paths, "-o", out) == 0
    return Page(out.read_text())


def two_sides(root):
    """A baseline, and a faster candidate of another script."""
    same = "same = 0\n" * 30
    old = write_runs(root / "old", [loss + 0.01 for loss in LOSSES], OLD_TIMES,
                     code=f"import torch\nx = 1\n{same}", environment=facts(lr=1))
    new = write_runs(root / "new", LOSSES, NEW_TIMES, code=f"import torch\nx = 3\n{same}z = 1\n",
                     environment=facts(lr=2))
    return Path(old), Path(new)


def test_the_verdict_is_that_of_verify(tmp_path, capsys):
    old, new = two_sides(tmp_path)
    page = report(old, new, out=tmp_path / "page.html")
    capsys.readouterr()
    assert main("verify", new, "--baseline", old) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = page.texts["td"]
    for line in lines[:-2]:
        word, _, rest = line.partition(" ")
        name, _, figures = rest.strip().rpartition(": ")
        assert word in cells and figures in " ".join(cells)
        assert name.split(":")[0] in " ".join(page.texts["th"])
    assert lines[-2] in page.texts["li"] and lines[-1] in page.texts["p"][1].lower()
    changes = [text for text in page.texts["span"] if text[0] in "-+"]
    assert changes == ["-x = 1", "+x = 3", "+z = 1"]
    settings = page.texts["tr"]
    assert "lr12" in settings  # the setting that differs, with both values


def test_the_page_is_whole_and_its_links_lead_to_the_logs(tmp_path):
    """It needs no network. The content security policy allows its own script and style alone."""
    folder = tmp_path / "a folder # ?"
    page = report(*two_sides(folder), out=tmp_path / "page.html")
    links = page.values("href")
    assert len(links) == 10 and all((tmp_path / unquote(link)).is_file() for link in links)
    assert all(source.startswith("data:image/svg+xml") for source in page.values("src"))
    (policy,) = [value for value in page.values("content") if "default-src" in value]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for kind in ("script", "style"):
        (text,) = page.texts[kind]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy


EVIL = ("</script><script>hacked = 1</script><img src=x onerror=\"hacked = 2\">'\"><b id=hacked>"
        "&lt;{{ 7 * 7 }}{% raw %}]]>-->")
INVISIBLE = "\u202egpj.exe\u2066\u200b\ufeff\u2028\x1b[31m"


def write_hostile(root):
    """Two sides whose folders, files, settings, values and code hold hostile text."""
    name = (EVIL + INVISIBLE).replace("/", "\u2215")
    settings = {"seed": EVIL, "batch_size": 8, EVIL: EVIL + INVISIBLE, "__proto__": 1}
    environment = facts(hyperparameters=settings, script=f"records/{name}/train_gpt.py",
                        torch=INVISIBLE, data_fingerprint=EVIL)
    code = f"# {EVIL}\n# {INVISIBLE}\n{'x' * 10_000}\0\nhuge = '{'<' * 1_000_000}'\n"
    folders = []
    for side, losses in (("a", [3.27, 3.28]), ("b", [3.26, 3.25])):
        for seed, loss in enumerate(losses):
            text = log(code=f"{code}# {side}\n", environment=environment, body=metrics(loss))
            write(root / name / side, [text], name=f"{name[:60]}{seed}.txt")
        folders.append(root / name / side)
    return folders


def test_hostile_text_stays_text(tmp_path):
    for number, paths in enumerate((write_hostile(tmp_path), [tmp_path])):
        out = tmp_path / f"{number}.html"
        page = report(*paths, out=out)
        text = out.read_text()
        assert not re.search("[\0\u202e\u2066\u200b\ufeff\u2028\x1b]", text) and len(text) < 2e6
        names = [tag for tag, _ in page.tags]
        assert names.count("script") == names.count("img") == 1 and "b" not in names
        assert not page.values("id") and not page.values("onerror")
        shown = "\n".join(page.texts["td"])
        assert EVIL in shown and "\\u202egpj" in shown


@needs_chromium
def test_in_a_browser_no_text_of_a_log_runs(tmp_path):
    out = tmp_path / "page.html"
    report(*write_hostile(tmp_path), out=out)
    done = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
                           f"--user-data-dir={tmp_path / 'profile'}", out.as_uri()],
                          capture_output=True, text=True, timeout=300)
    names = [tag for tag, _ in Page(done.stdout).tags]
    assert names.count("script") == names.count("img") == 1 and "b" not in names


@needs_chromium
def test_in_a_browser_a_click_sorts_a_table(tmp_path):
    """The page's script runs on a copy of the page with one more script, which clicks."""
    out = tmp_path / "page.html"
    report(*two_sides(tmp_path), out=out)
    text = re.sub("<meta http-equiv[^>]*>", "", out.read_text())
    click = ("<script>const table = [...document.querySelectorAll('table.sortable')].at(-1);"
             "table.tHead.rows[0].cells[2].firstChild.click();</script></body>")
    out.write_text(text.replace("</body>", click))
    done = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
                           f"--user-data-dir={tmp_path / 'profile'}", out.as_uri()],
                          capture_output=True, text=True, timeout=300)
    losses = re.findall(r"<td>(3\.2\d\d\d)</td>", done.stdout)[-10:]
    assert len(losses) == 10 and losses == sorted(losses)


def test_an_entry_shows_its_other_runs_with_their_differences(tmp_path):
    entry = Path(write_entries(tmp_path)) / "2030-02-02_New"
    page = report(entry, out=tmp_path / "page.html")
    assert "2030-02-02_New against 2030-01-01_Old" in page.texts["h1"][0]
    rows = [text for text in page.texts["tr"] if "2030-02-02_New, ngrams 1" in text]
    assert any("3.4000" in row and "+0.1225" in row for row in rows)


def test_every_public_layout_can_be_shown(tmp_path):
    texts = [text for text, *_ in LAYOUTS.values()] + [log(body=body) for body in FORMS.values()]
    texts += [llm_c(990), "nothing", log(body=metrics(died_at=12)), log(body=metrics(restart=True)),
              metrics().replace("3.2775", "nan"), log(body="nothing\n")]
    page = report(write(tmp_path / "public", texts), out=tmp_path / "page.html")
    assert len(page.values("src")) == 1


def test_two_paths_that_are_no_two_sides_get_a_page_without_a_verdict(tmp_path):
    old, new = two_sides(tmp_path)
    (new / "other.txt").write_text(log(code="import other\n"))
    page = report(old, new, out=tmp_path / "mixed.html")
    assert "conclusion" not in page.values("class")
    (new / "other.txt").unlink()
    logs = [*sorted(old.glob("*.txt")), *sorted(new.glob("*.txt"))]  # as a shell expands globs
    assert "conclusion" in report(*logs, out=tmp_path / "globs.html").values("class")


@pytest.mark.parametrize("value", ["abc", 5, None, [1], {"a": 1}, 1e400])
def test_settings_of_any_type_are_shown(tmp_path, value):
    names = ("target", "script", "run_id", "hyperparameters", "data_fingerprint", "stage_tokens")
    texts = [log(environment=facts(**{name: value})) for name in names]
    texts.append(log(environment=facts(hyperparameters={"seed": value, "track": value})))
    report(write(tmp_path, texts), out=tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text().replace("&#34;", '"')
    assert value is None or json.dumps(value).strip('"') in text
