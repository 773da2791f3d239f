import pytest

from dflash_decode import costs


@pytest.fixture(autouse=True)
def no_costs_are_left(monkeypatch):
    """What a step costs is measured, and written nowhere."""
    monkeypatch.setattr(costs, "cache_dir", lambda: None)
