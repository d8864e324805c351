"""Run every check and every test of a fresh clone: ``python3 ci/test.py``."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import environment
import runner
from progress import Progress


def main() -> int:
    """Lint, check types, run all tests on the default release and some suites on other releases.

    With ``--lint``, only lint and check types. With ``--docs``, only build the site. With ``--quick``, run a part of the tests, on the default
    release. Other arguments are passed to pytest, which then runs on the default release only. With
    ``--durations``, save how long each suite took. Return 0 if everything passed.
    """
    arguments = sys.argv[1:]
    if arguments == ["--docs"]:
        build_site()
        return 0
    lint()
    if arguments == ["--lint"]:
        return 0
    python = environment.release_environment()
    if arguments == ["--quick"]:
        arguments = [*runner.paths(["quick"]), "-q"]
    if arguments and arguments != ["--durations"]:
        return 0 if run_default(python, arguments) else 1
    # ci/matrix.py runs these two, with one engine per release.
    one_per_release = [
        f"tests/end_to_end/{name}.py" for name in ("test_release", "test_release_stock")
    ]
    engines = ["tests/end_to_end", *(f"--ignore={path}" for path in one_per_release)]
    engines += ["tests/moe/test_engine.py", "tests/quantised/test_engine.py"]
    engines += ["tests/scale/test_load.py"]
    pages = [
        f"tests/test_{name}.py" for name in ("readme", "docs", "packaging", "structure", "upstream")
    ]
    with ThreadPoolExecutor() as pool:
        # In parallel with the engines: an engine that starts leaves a core idle.
        rest = pool.submit(run_suites, python, bool(arguments))
        passed = run_default(python, [*pages, *engines])
        passed = rest.result() and passed
    return 0 if passed else 1


def lint() -> None:
    """Lint the code, check types, the workflows, the distributions and the site.

    Raises:
        subprocess.CalledProcessError: one of them is not right.
    """
    python = environment.lint_environment()
    tools = python.parent
    environment.run(python, "-m", "ruff", "check")
    environment.run(python, "-m", "ruff", "format", "--check")
    environment.run(python, "-m", "mypy")
    environment.run(tools / "lint-imports")
    workflows = sorted((environment.ROOT / ".github" / "workflows").glob("*.yml"))
    schema = ("--builtin-schema", "vendor.github-workflows")
    environment.run(tools / "check-jsonschema", *schema, *workflows)
    environment.run(tools / "zizmor", "--offline", "--quiet", ".github")
    built = environment.build(environment.CACHE / "distributions")
    environment.run(tools / "twine", "check", "--strict", *built)
    environment.run(tools / "check-wheel-contents", built[-1])
    # The project has no address for mail; its address for reports is that of the issues.
    environment.run(tools / "pyroma", "-n", "10", "--skip-tests", "AuthorEmail", built[0])
    build_site()


def build_site() -> None:
    """Build the site of ``docs`` in the cache folder.

    Raises:
        subprocess.CalledProcessError: a page has a dead link, or is missing in the navigation.
    """
    mkdocs = environment.lint_environment().parent / "mkdocs"
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    environment.run(
        mkdocs, "build", "--strict", "--site-dir", environment.CACHE / "site", env=quiet
    )


def run_default(python: Path, arguments: list[str]) -> bool:
    """Run pytest on the default release and show its output; return whether it passed."""
    environment.say("running the tests")
    status = subprocess.call(
        [python, "-P", "-m", "pytest", *arguments],
        cwd=environment.ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
    )
    return status == 0


def run_suites(default: Path, save: bool) -> bool:
    """Run the suites of ``eras`` in ci/matrix.toml; show the log of each release that fails.

    ``default`` is the Python of the default release. The engines use its environment at the
    same time, so the wheel must not be installed in it again. ``save``: write the durations. Return
    whether everything passed.
    """
    passed = True
    eras = environment.matrix()["eras"]
    runs = {
        f"vLLM {release}, {', '.join(names)}": (release, names)
        for release, suites in eras.items()
        for names in runner.split(suites)
    }
    progress = Progress(list(runs))
    folder = environment.CACHE / "logs"
    folder.mkdir(exist_ok=True)
    for label, (release, names) in runs.items():
        environment.say(f"{label}: running")
        is_default = release == environment.matrix()["default"]
        python = default if is_default else environment.release_environment(release)
        log = folder / f"{release}-{names[0]}.log"
        counts = runner.count(runner.run_pytest(release, python, runner.paths(names), log))
        environment.say(
            f"{label}: {counts['passed']} passed, {counts['failed']} failed, {progress.finish(label)}"
        )
        if counts["failed"] or not counts["passed"]:
            print(log.read_text())
            passed = False
    if save and passed:
        progress.save()
    return passed


if __name__ == "__main__":
    sys.exit(main())
