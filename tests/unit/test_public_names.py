"""The public names: what ``durable`` exports, each with an example that runs as a doctest."""

from __future__ import annotations

import pytest

import durable


@pytest.mark.parametrize("name", durable.__all__)
def test_a_public_name_has_a_docstring_with_an_example(name: str) -> None:
    doc = getattr(durable, name).__doc__ or ""
    assert ">>>" in doc, f"durable.{name} has no example"


def test_the_list_is_sorted_and_without_doubles() -> None:
    assert list(durable.__all__) == sorted(set(durable.__all__))
