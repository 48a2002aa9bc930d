"""Four kills of the torture test, one for each kind of moment; `python -m tests.helpers.torture` does more."""

import pytest

from tests.helpers.torture import ENVIRONMENT, torture


@pytest.mark.slow
def test_four_kills_of_two_sharded_ranks_leave_no_trace(tmp_path, monkeypatch):
    for name, value in {**ENVIRONMENT, "S3_ENDPOINT_URL": ""}.items():  # torture sets the last itself
        monkeypatch.setenv(name, value)
    assert torture(4, ranks=2, fsdp=True, seed=0, top=tmp_path) == []
