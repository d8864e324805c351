"""The steps of the release workflow that are more than one command.

python3 ci/release.py check TAG REPOSITORY   # may this tag of this repository be published?
python3 ci/release.py notes                  # the section of CHANGELOG.md of this version
python3 ci/release.py build FOLDER           # the source distribution, and the wheel made from it
"""

from __future__ import annotations

import re
import sys
from datetime import date

import environment

#: A heading of CHANGELOG.md: the version, and the day of its release or ``Unreleased``.
HEADING = re.compile(r"^## \[(\S+)\] - (.+)$", re.MULTILINE)


def main() -> int:
    """Carry out the command of the arguments; return 0, or 1 if the tag may not be published."""
    match sys.argv[1:]:
        case ["check", tag, repository]:
            found = problems(tag, repository)
            print("\n".join(found))
            return 1 if found else 0
        case ["notes"]:
            print(section(version())[1])
        case ["build", folder]:
            environment.build(environment.ROOT / folder)
        case _:
            print(__doc__)
            return 2
    return 0


def version() -> str:
    """Return the version of the package's sources."""
    text = (environment.ROOT / "vllm_nway_lora" / "__init__.py").read_text()
    [found] = re.findall(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    return str(found)


def section(of: str) -> tuple[str, str]:
    """Return the day and the text of a version in CHANGELOG.md.

    Raises:
        KeyError: CHANGELOG.md has no heading for that version.
    """
    _, *parts = HEADING.split((environment.ROOT / "CHANGELOG.md").read_text())
    sections = dict(zip(parts[::3], zip(parts[1::3], parts[2::3], strict=True), strict=True))
    day, text = sections[of]
    return day, text.strip()


def problems(tag: str, repository: str) -> list[str]:
    """Return the reasons why ``tag`` of the repository at that address may not be published."""
    found = []
    if tag != f"v{version()}":
        found.append(f"the tag is {tag}, and the package's version is {version()}")
    named = environment.repository()
    if repository != named:
        found.append(f"the repository is {repository}, and pyproject.toml names {named}")
    try:
        day, text = section(version())
    except KeyError:
        return [*found, f"CHANGELOG.md has no section for {version()}"]
    try:
        date.fromisoformat(day)
    except ValueError:
        found.append(f"CHANGELOG.md dates {version()} as {day!r}, which is no date like 2026-01-31")
    if "TODO" in text:
        found.append(f"CHANGELOG.md has a TODO in the section of {version()}")
    return found


if __name__ == "__main__":
    sys.exit(main())
