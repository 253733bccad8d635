"""What our agent makes of torchrun's, told without starting any; what it does for real is in test_torchrun.py."""

from __future__ import annotations

import pytest
from patches import Replace

from launcher.supervise.agent import Asked, Watch, _set_to_watch


def test_ranks_have_their_grace_when_a_machine_joins(monkeypatch: pytest.MonkeyPatch, replace: Replace) -> None:
    """torch stops them with 30 s of its own. Seen to fail without `_stop_workers`."""
    from torch.distributed.launcher import api

    monkeypatch.setattr(api, "LocalElasticAgent", api.LocalElasticAgent)  # put back in the end
    _set_to_watch(Watch(None, object.__new__(Asked), elastic=True))
    agent = object.__new__(api.LocalElasticAgent)
    agent._shutdown_timeout = 300
    given = []
    replace(type(agent), "_shutdown", lambda self, death_sig=None, timeout=30: given.append(timeout))
    agent._stop_workers(None)
    assert given == [300]
