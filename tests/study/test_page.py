"""The report's pictures and its HTML page, looked at in a real browser at two widths."""

import importlib.util
import json
import re
import shutil
import subprocess

import pytest

from dsv3_mtp.study import hover
from dsv3_mtp.study.archive import read_archive, read_results, write_results
from dsv3_mtp.study.folder import report_study
from dsv3_mtp.study.page import Live, Picture, to_html
from dsv3_mtp.study.plan import load_archive, read_plan
from dsv3_mtp.study.report import write_report
from tests.study.toy import five_seeds, load_toy, write_runs

LIVE = importlib.util.find_spec("bokeh") is not None
PICTURES = {f"{name}.png" for name in ("answer", "loss", "effects", "depths", "tradeoff", "lambda")}
PICTURES |= {"balance.png", "solved.png"}


def solving(tree) -> None:
    five_seeds(tree)
    tree["solve_threshold"] = 0.9
    task = {"type": "suffix_sum", "terms": 6}
    tree["set"] = {"data.task": task, "data.train": None, "data.val": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a whole report."""
    loaded = load_toy(tmp_path_factory.mktemp("report"), solving)
    write_runs(loaded, {"none": 4.0, "constant": 4.1, "step": 4.1})
    first = loaded.study.folder / "step-seed1"
    write_results(first, read_results(first).model_copy(update={"solved_at": 300}))
    return report_study(loaded).parent


def test_pictures_are_drawn_for_the_data_that_there_are(folder):
    assert set(re.findall(r"\]\((\w+\.png)\)", (folder / "report.md").read_text())) == PICTURES
    assert {path.name for path in folder.glob("*.png")} == PICTURES


NAMES = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome")
BROWSER = next((name for name in NAMES if shutil.which(name)), None)
# The page stands in a frame of the width asked for: a headless window is never as narrow as a
# phone's.
FRAME = """<!doctype html><body style="margin:0"><iframe id="f" width="{width}" height="900"
 srcdoc="{page}"></iframe><script>
const look = () => {
  const inner = document.getElementById('f').contentWindow, page = inner.document;
  const box = element => element.getBoundingClientRect();
  const found = {
    images: [...page.images].map(i => [i.complete && i.naturalWidth > 300, box(i).height]),
    tables: [...page.querySelectorAll('table')].map(t => box(t).width > 200 && box(t).height > 50),
    text: [...page.querySelectorAll('p, li')].map(
      p => parseFloat(inner.getComputedStyle(p).fontSize)),
    plots: [...page.querySelectorAll('figure > div[id]')].map(d => box(d.firstElementChild).width),
    wide: page.documentElement.scrollWidth > inner.innerWidth,
    viewport: page.querySelector('meta[name=viewport]').content,
    outside: inner.performance.getEntriesByType('resource').filter(
      r => !r.name.startsWith('data:')).length,
    hidden: null,
  };
  const filter = page.querySelector('#arms input[value=step]');
  if (filter) {
    filter.click();
    const parts = inner.Bokeh.documents.flatMap(d => d.roots().flatMap(r => [...r.references()]));
    const visible = name => parts.filter(p => p.name === name).map(p => p.visible);
    found.hidden = [visible('step').length > 3, visible('step').some(v => v),
      visible('constant').every(v => v)];
  }
  document.body.dataset.found = JSON.stringify(found);
};
addEventListener('load', () => setTimeout(look, 1500));
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium installed (the distribution's `chromium`)")
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_is_whole_in_a_real_browser(folder, tmp_path, width):
    page = (folder / "report.html").read_text().replace("&", "&amp;").replace('"', "&quot;")
    looked = tmp_path / "looked.html"
    looked.write_text(FRAME.replace("{width}", str(width)).replace("{page}", page))
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=10000", "--window-size=1400,1000"]
    done = subprocess.run(
        [*command, f"file://{looked}"], capture_output=True, text=True, timeout=120
    )
    errors = [line for line in done.stderr.splitlines() if "CONSOLE" in line and "rror" in line]
    assert not errors
    found = json.loads(re.search(r'data-found="([^"]*)"', done.stdout)[1].replace("&quot;", '"'))
    live = 3 if LIVE else 0
    assert len(found["images"]) == len(PICTURES) - live
    assert all(whole and height > 120 for whole, height in found["images"]), found["images"]
    assert len(found["tables"]) >= 4 and all(found["tables"])
    assert min(found["text"]) >= 14 and "width=device-width" in found["viewport"]
    assert not found["wide"] and found["outside"] == 0
    if LIVE:
        assert len(found["plots"]) == live and all(250 < w <= width for w in found["plots"])
        assert found["hidden"] == [True, False, True]


def test_the_page_needs_no_network(folder):
    page = (folder / "report.html").read_text()
    tags = re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", page)
    assert tags and not any(re.search(r'(src|href)="(?!data:)', tag) for tag in tags)


def test_without_the_plotting_library_the_page_says_what_it_lacks(folder, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    live = hover.live(None)  # type: ignore[arg-type]
    assert "pip install 'dsv3_mtp[report]'" in live.controls and not live.elements
    page = to_html([Picture("loss.png", "losses")], live, title="x", folder=folder)
    assert page.count("<img") == 1 and "dsv3_mtp[report]" in page and "<fieldset" not in page


def test_a_report_is_rebuilt_from_its_archive_byte_for_byte(folder, tmp_path, monkeypatch):
    """And its pictures from the same data; run folders are not looked at."""
    monkeypatch.setattr(hover, "live", lambda data: Live())
    for name in ("plan.json", "results.jsonl"):
        shutil.copy(folder / name, tmp_path)
    write_report(load_archive(tmp_path), read_plan(tmp_path), read_archive(tmp_path), tmp_path)
    for name in ("report.md", "plan.json", "results.jsonl", *PICTURES):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name
