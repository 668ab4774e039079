"""The pages say what the code does: generated ones are up to date, the glossary has every metric,
links lead somewhere.
"""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsv3_mtp.config import TASKS
from dsv3_mtp.data.ngrams import floor_metrics
from dsv3_mtp.objectives import registry as objectives
from dsv3_mtp.study.metric_names import METRICS
from dsv3_mtp.train.drafts import DraftStatistics

ROOT = Path(__file__).parents[1]
GLOSSARY = (ROOT / "docs" / "metrics.md").read_text()
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def test_pages_that_are_made_from_the_code_are_up_to_date():
    """`python docs/write_pages.py` writes them."""
    spec = importlib.util.spec_from_file_location("write_pages", ROOT / "docs/write_pages.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, write in module.PAGES.items():
        assert (ROOT / "docs" / name).read_text() == write(), (
            f"run python docs/write_pages.py: {name}"
        )


def explained() -> list[re.Pattern[str]]:
    """The keys of the glossary's tables as patterns."""
    rows = [line for line in GLOSSARY.splitlines() if line.startswith("| `")]
    keys = [key for row in rows for key in re.findall(r"`([^`]+)`", row.split(" | ")[0])]
    patterns = [re.escape(key).replace("NAME", r"\w+") for key in keys]
    patterns = [re.sub(r"(?<=/)k$", r"(k|\\d+)", pattern) for pattern in patterns]
    return [re.compile(re.sub(r"(?<=_)X", r"[\\d.]+", pattern)) for pattern in patterns]


def unexplained(names) -> list[str]:
    patterns = explained()
    return sorted(name for name in names if not any(p.fullmatch(name) for p in patterns))


def test_the_glossary_has_what_a_study_can_ask_for():
    assert unexplained(METRICS) == []


def test_the_glossary_has_every_task_objective_floor_and_draft_statistic():
    assert unexplained(name for task in TASKS.values() for name in task.METRICS) == []
    names = [name for name, kind in objectives().items() if not kind.cross_entropy]
    assert (
        names and unexplained(f"{split}/{n}/1" for n in names for split in ("train", "val")) == []
    )
    orders = dict.fromkeys(("unigram", "bigram", "trigram"), 1.0)
    assert unexplained(floor_metrics(orders, 1.0)) == []
    drafts = DraftStatistics([2, 3], 64, temperature=1.0, device=torch.device("cpu"))
    drafts.bins += 1.0
    assert len(found := drafts.metrics()) > 100 and unexplained(found) == []


def test_the_glossary_has_every_metric_that_the_sources_name():
    pattern = re.compile(r'"((?:train|val|optim|moe|perf|task)/[^"]+)"')
    files = [
        p for part in ("train", "tasks", "data") for p in (ROOT / "dsv3_mtp" / part).glob("*.py")
    ]
    named = {name for path in files for name in pattern.findall(path.read_text())}
    filled = {re.sub(r"\{(k|depth)\}$", "1", name) for name in named if not name.endswith("/")}
    assert len(filled) > 20
    assert unexplained(name for name in filled if "{" not in name) == []


def test_a_metric_that_nobody_explained_would_be_found():
    assert unexplained(["train/main_loss", "val/overlap/12", "val/surprise", "val/overlap/x"]) == [
        "val/overlap/x",
        "val/surprise",
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page: Path):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(1200)
def test_the_tutorial_runs(tmp_path: Path):
    """Its study file and its commands, in a folder with the clone's configs and fewer tokens."""
    text = (ROOT / "docs" / "tutorial.md").read_text()
    (yaml,) = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "my_lambda.yaml").write_text(yaml)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines()]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    output = []
    for command in commands:
        program, *words = shlex.split(command)
        assert program == "dsv3"
        less = ["--set", "train.total_tokens=20480"] if "--study" in words else []
        arguments = [sys.executable, "-m", "dsv3_mtp", *words, *less]
        done = subprocess.run(
            arguments, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        output.append(done.stdout)
    assert "12 runs" in output[0] and "[12/12]" in output[1] and "[4/4]" in output[2]
    report = (tmp_path / "runs/my_lambda/report.md").read_text()
    assert (
        "not interpretable" in report.split("## Question")[0].lower()
        and "Seeds added after the first start: 4." in report
    )
    assert (tmp_path / "my_archive/report.md").exists()
