"""Which numbers of shared memory streaming looks at."""

import itertools
import tempfile

from streaming.base.shared import prefix

from sit_composer.data.shared_names import one_job_at_a_time


def test_numbers_that_earlier_jobs_have_left_are_passed_over_without_a_look_at_each(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("000000_barrier_filelock", "000001_cache_filelock", "000003_cache_filelock", "000004_other"):
        (tmp_path / name).touch()
    with one_job_at_a_time():
        assert list(itertools.islice(prefix._each_prefix_int(), 3)) == [2, 4, 5]
