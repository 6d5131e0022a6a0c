"""Processes for the tests of this folder."""

import pytest

from helpers.process_group import Team


@pytest.fixture(scope="session")
def team(request):
    """The processes of a group; see `helpers.process_group.over_processes`."""
    team = Team(*request.param)
    yield team
    team.stop()
