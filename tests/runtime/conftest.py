"""What the batteries of networks share."""

import pytest

from mirrormask.runtime.graph.settled import OpenSizes, Settled


@pytest.fixture
def nothing_is_settled(monkeypatch):
    """No pass decides about a size that is open: the capture would be of the program as it was, in many regions."""
    check, settled = OpenSizes.check, []

    def noting(self: OpenSizes) -> None:
        try:
            check(self)
        except Settled:
            settled.append(self)
            raise

    monkeypatch.setattr(OpenSizes, "check", noting)
    yield
    assert not settled
