"""Five kills of the torture test; `python -m tests.helpers.torture` does more."""

import pytest

from tests.helpers.torture import ENVIRONMENT, torture


@pytest.mark.slow
def test_five_kills_of_two_sharded_ranks_leave_no_trace(tmp_path, monkeypatch):
    for name, value in {**ENVIRONMENT, "S3_ENDPOINT_URL": ""}.items():  # torture sets the last itself
        monkeypatch.setenv(name, value)
    assert torture(5, ranks=2, fsdp=True, seed=0, top=tmp_path) == []
