"""The table of defects, and the groups of patches that name them."""

from __future__ import annotations

from packaging.version import Version

from vllm_nway_lora.compat import defects, groups
from vllm_nway_lora.compat.defects import DEFECTS, Defect, Seen
from vllm_nway_lora.compat.releases import KNOWN


def test_messages_depend_on_version() -> None:
    gap = Defect(
        "gap", "", (Seen("0.17.0", "0.18.1", ("a",)), Seen("0.29.0", None, ("b",))), (), ""
    )
    for version, messages in [
        ("0.16.0", None),
        ("0.17.0", ("a",)),
        ("0.18.1+cpu", ("a",)),
        ("0.19.0", None),
        ("0.28.0", None),
        ("0.29.0", ("b",)),
        ("9", ("b",)),
        ("dev", ("b",)),
    ]:
        assert gap.messages(version) == messages, version
        assert gap.affects(version) == (messages is not None), version


def test_table_is_in_order() -> None:
    assert len({defect.name for defect in DEFECTS}) == len(DEFECTS)
    for defect in DEFECTS:
        bounds = [bound for seen in defect.seen for bound in (seen.first, seen.last)]
        assert set(bounds) <= {*KNOWN, None}
        assert None not in bounds[:-1]
        assert bounds[:-1] == sorted(bounds[:-1], key=Version)


def test_every_group_names_defects_of_the_table() -> None:
    for group in groups.GROUPS:
        assert group.defects
        assert any(groups.is_needed(group, version) for version in KNOWN)
        for name in group.defects:
            assert defects.find(name).name == name
