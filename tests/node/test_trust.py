"""Whom a worker serves."""

from __future__ import annotations

import logging

import pytest

from node.trust import Trust


def test_without_names_the_first_coordinator_that_is_followed_is_kept_to() -> None:
    trust = Trust(())
    assert trust("alice")
    assert trust("bob")  # asking alone decides nothing
    trust.follow("bob")
    assert trust("bob")
    assert not trust("alice")
    trust.follow("bob")
    assert trust("bob")


def test_named_coordinators_are_the_only_ones() -> None:
    trust = Trust(iter(["alice", "bob"]))
    assert [trust(each) for each in ("alice", "bob", "eve", "")] == [True, True, False, False]
    trust.follow("alice")
    assert trust("bob")
    assert not trust("eve")


def test_following_a_second_one_changes_nothing() -> None:
    trust = Trust([])
    trust.follow("alice")
    trust.follow("eve")
    assert trust("alice")
    assert not trust("eve")


def test_the_owner_is_told_once_whom_the_worker_serves(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "node.trust")
    trust = Trust(())
    trust.follow("alice")
    trust.follow("alice")
    assert [record.fields["peer"] for record in caplog.records] == ["alice"]  # type: ignore[attr-defined]
