"""Five kills of the torture test; `python -m tests.torture` does more."""

import pytest

from tests.torture import torture


@pytest.mark.slow
def test_five_kills_of_two_sharded_ranks_leave_no_trace(tmp_path, monkeypatch):
    monkeypatch.setenv("S3_ENDPOINT_URL", "")  # which it sets
    assert torture(5, ranks=2, fsdp=True, seed=0, top=tmp_path) == []
