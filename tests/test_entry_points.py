"""What is installed is what the workspace declares, and every description keeps its word without torch."""

from __future__ import annotations

from importlib.metadata import entry_points

import pytest

from fastvideo_vae_core import Family, families, resolve
from workspace import ENTRY_POINT_GROUP, Member, installable_members, members

FAMILIES = [member for member in installable_members() if member.is_family]


def test_the_installed_entry_points_are_those_of_the_workspace() -> None:
    installed = {point.name: point.value for point in entry_points(group=ENTRY_POINT_GROUP)}
    assert installed == {name: value for member in FAMILIES for name, value in member.families.items()}
    assert families() == tuple(sorted(installed))


@pytest.mark.parametrize("member", FAMILIES, ids=lambda member: member.name)
def test_a_family_is_named_like_its_distribution(member: Member) -> None:
    assert member.families == {
        member.import_name.removeprefix("fastvideo_vae_"): f"{member.import_name}.family:FAMILY",
    }
    family = resolve(*member.families)
    assert (family.name, family.distribution) == (*member.families, member.name)


@pytest.mark.parametrize("member", FAMILIES, ids=lambda member: member.name)
def test_every_class_name_resolves_to_its_family_only(member: Member) -> None:
    family = resolve(*member.families)
    assert family.class_names
    assert all(resolve(class_name) is family for class_name in family.class_names)


@pytest.mark.parametrize("member", FAMILIES, ids=lambda member: member.name)
def test_a_family_ships_what_its_demo_needs(member: Member) -> None:
    family: Family = resolve(*member.families)
    shipped = [name for name in (family.demo, family.demo_media) if name]
    assert len(shipped) == 2
    assert all(family.resource(name).exists() for name in shipped)


def test_a_skeleton_registers_nothing() -> None:
    skeletons = [member for member in members() if not member.installable]
    assert not any(member.families for member in skeletons)
    assert not {member.import_name.removeprefix("fastvideo_vae_") for member in skeletons} & set(families())
