"""For the tests and for the examples in docstrings."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hf_lottalora import FAMILIES


@pytest.fixture(autouse=True)
def families_as_they_were() -> Iterator[None]:
    """Some register their own, which others would see after them."""
    before = dict(FAMILIES)
    yield
    FAMILIES.clear()
    FAMILIES.update(before)
