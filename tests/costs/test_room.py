import re

import pytest

from sit_composer.config.load import load_config
from sit_composer.config.schema import ConfigError
from sit_composer.costs import estimate, room
from sit_composer.memory import UNIMPORTANT
from tests.helpers.paths import ROOT


def test_a_batch_that_does_not_fit_is_told_with_the_number_that_does(monkeypatch):
    config = load_config(str(ROOT / "yamls/sit_s_2.yaml"), [*UNIMPORTANT, "data.global_batch_size=4096"])
    monkeypatch.setattr(room, "room", lambda: 4 * estimate.GIB)
    message = r"microbatch_size: got 4096, which needs .* there are 4 GiB, expected at most"
    with pytest.raises(ConfigError, match=message) as told:
        room.check_room(config, False, 1, 4096)
    fits = int(re.search(r"at most (\d+)", str(told.value))[1])
    assert 1 < fits < 4096
    assert re.fullmatch(r"3\.\d+ of 4 GiB per rank|2\.\d+ of 4 GiB per rank", room.check_room(config, False, 1, fits))
    monkeypatch.setattr(room, "room", lambda: estimate.GIB // 4)
    with pytest.raises(ConfigError, match="expected a smaller network, or fsdp with more ranks"):
        room.check_room(config, False, 1, 1)


def test_a_containers_limit_counts(monkeypatch, tmp_path):
    machine = room.room()
    for text, expected in (("max\n", machine), (f"{2 * estimate.GIB}\n", 2 * estimate.GIB)):
        (tmp_path / "memory.max").write_text(text)
        monkeypatch.setattr(room, "CGROUP", tmp_path / "memory.max")
        assert room.room() == expected
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert room.room() == estimate.GIB
