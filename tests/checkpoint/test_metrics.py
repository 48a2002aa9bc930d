"""A run's metrics.jsonl, as kills at any moment leave it."""

import json

from hypothesis import example, given
from hypothesis import strategies as st

from sit_composer.checkpoint.metrics import EXACT, NAME, MetricsFile, read, row_length
from sit_composer.storage import LocalFolder

LAST, SAVE = 30, 4  # batches, and those between two checkpoints


def lines(*rows: dict) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@given(st.lists(st.tuples(st.integers(1, LAST), st.integers(0, 80)), max_size=6))
@example([(1, 0)])  # before anything is written
@example([(7, 1), (7, 19)])  # with half a line, twice at one batch
def test_after_kills_each_batch_counts_once_and_half_a_line_harms_no_other(tmp_path_factory, kills):
    """A kill comes before a batch, and leaves so many bytes of its row; training goes on from the last checkpoint."""
    folder = LocalFolder(str(tmp_path_factory.mktemp("run")))
    saved = 0
    for number, (killed, left) in enumerate([*kills, (LAST + 1, 0)]):
        file = MetricsFile(folder)
        file.append(lines({"start": saved, "number": number}))
        for batch in range(saved + 1, LAST + 1):
            row = lines({"batch": batch, "batches": 1, "loss": batch / 2})
            if batch == killed:
                file.append(row[: min(left, len(row) - 1)])
                break
            file.append(row)
            if batch % SAVE == 0:
                saved = batch
    attempts, rows = read(folder.read(NAME))
    assert [attempt["number"] for attempt in attempts] == list(range(len(kills) + 1))
    assert rows == [{"batch": n, "batches": 1, "loss": n / 2} for n in range(1, LAST + 1)]


@given(
    st.binary(max_size=200), st.lists(st.sampled_from(["[]", "1", "null", '{"batch": "x"}', '{"start": null}', "{"]))
)
def test_what_is_no_row_is_left_out(noise, others):
    content = b"\n".join([noise, *(other.encode() for other in others), b'{"batch": 5}'])
    assert read(content)[1][-1:] == [{"batch": 5}]
    assert read(b'{"batch": 5, "loss": NaN, "lr": -Infinity}')[1] == [{"batch": 5, "loss": None, "lr": None}]


def test_a_long_run_has_few_rows():
    batch = rows = 0
    while batch < 10_000_000:
        length = row_length(batch + 1)
        batch, rows = (batch // length + 1) * length, rows + 1  # a row ends at the next multiple of its length
    assert (batch, rows) == (10_000_000, EXACT - 1 + 3 * 9_000 + 1)
    assert [row_length(n) for n in (1, EXACT - 1, EXACT, 99_999, 100_000)] == [1, 1, 10, 10, 100]
