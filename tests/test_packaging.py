"""The package's metadata, the release workflow's checks, and the links of the pages."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

import vllm_nway_lora

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
REPOSITORY = PROJECT["urls"]["Repository"]
README = (ROOT / "README.md").read_text()
PYTHONS = tomllib.loads((ROOT / "ci" / "matrix.toml").read_text())["python"]
LINK = re.compile(r"\]\(([^)]+)\)")


def check(tag: str, repository: str = REPOSITORY) -> list[str]:
    """Return what the release workflow has against a tag."""
    command = [sys.executable, ROOT / "ci" / "release.py", "check", tag, repository]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    lines = done.stdout.split("\n")
    assert done.returncode == (1 if any(lines) else 0), done.stderr
    return lines


def test_each_version_of_python_has_passed() -> None:
    prefix = "Programming Language :: Python :: 3."
    named = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if c.startswith(prefix)]
    assert named == list(PYTHONS)
    assert PROJECT["requires-python"] == f">={named[0]}"
    for version in named:
        result = json.loads((ROOT / "ci" / "results" / f"python-{version}.json").read_text())
        assert result["python"].startswith(f"{version}.")
        assert result["suites"]["quick"]["passed"] > 200
        assert result["suites"]["quick"]["failed"] == 0


def test_the_index_page_has_absolute_links_into_the_repository() -> None:
    page = README
    hook = PYPROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    for substitution in hook["substitutions"]:
        page = re.sub(substitution["pattern"], substitution["replacement"], page)
    before, after = (LINK.findall(text) for text in (README, page))
    assert len(before) == len(after) > 15
    for link, absolute in zip(before, after, strict=True):
        kind = "raw" if link.endswith(".svg") else "blob"
        assert absolute == f"{REPOSITORY}/{kind}/v$HFPR_VERSION/{link}"
        assert (ROOT / link.partition("#")[0]).exists()


def test_addresses_are_those_of_the_repository() -> None:
    owner, name = REPOSITORY.removeprefix("https://github.com/").split("/")
    urls = dict(PROJECT["urls"])
    assert urls.pop("Documentation") == f"https://{owner}.github.io/{name}"
    assert all(url.startswith(REPOSITORY) for url in urls.values())
    assert f"git clone {REPOSITORY} " in README


def test_the_release_workflow_refuses_another_version_or_repository() -> None:
    version = vllm_nway_lora.__version__
    assert check("v9.9.9")[0] == f"the tag is v9.9.9, and the package's version is {version}"
    [line] = [
        line for line in check(f"v{version}", "https://example.org/fork") if "example" in line
    ]
    assert line.endswith(f"and pyproject.toml names {REPOSITORY}")
    assert not any(f"v{version}" in line for line in check(f"v{version}"))


def test_the_changelog_has_the_notes_of_this_version() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "ci" / "release.py", "notes"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("### ")
    assert "\n## " not in done.stdout
    assert done.stdout in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize(
    ("result", "open_issue", "calls"),
    [
        ("failure", "", ["issue list", "label create", "issue create"]),
        ("failure", "7", ["issue list", "issue comment 7"]),
        ("success", "7", ["issue list", "issue close 7"]),
        ("success", "", ["issue list"]),
    ],
)
def test_the_newest_workflow_opens_updates_or_closes_an_issue(
    result: str, open_issue: str, calls: list[str], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    gh = tmp_path / "gh"
    gh.write_text(f'#!/bin/sh\necho "$@" >> {log}\n[ "$2" != list ] || echo "{open_issue}"\n')
    gh.chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "RESULT": result, "GITHUB_SERVER_URL": "https://s"}
    env |= {"GITHUB_REPOSITORY": "o/r", "GITHUB_RUN_ID": "5"}
    subprocess.run(["bash", ROOT / "ci" / "report_newest.sh"], check=True, env=env)
    made = log.read_text().splitlines()
    assert len(made) == len(calls)
    assert all(line.startswith(call) for line, call in zip(made, calls, strict=True))
    assert made == made[:1] or "https://s/o/r/actions/runs/5" in made[-1]
