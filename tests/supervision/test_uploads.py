import pytest

from sit_composer.checkpoint.folder import newest
from sit_composer.storage import S3Folder, StorageError
from sit_composer.supervision.lease import NAME, Lease
from sit_composer.supervision.uploads import Uploads
from tests.helpers.checkpoints import sharded_checkpoint

BEAT = 0.3


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> dict[str, bytes]:
    return sharded_checkpoint(tmp_path_factory.mktemp("sharded"))


def test_a_checkpoint_of_several_ranks_is_complete_when_the_last_shard_is_there(s3, tmp_path, shards):
    """Here rank 0 has only the metadata, and another rank the shard that the metadata names."""
    folder, place = S3Folder("s3://sit/run"), tmp_path / "ep1-ba30"
    lease = Lease(folder, BEAT)
    lease.acquire()
    place.mkdir()
    for name, content in shards.items():
        (tmp_path / name).write_bytes(content)
    (place / "__0_0.distcp").rename(place / "__1_0.distcp")
    uploads = Uploads(folder, lease, keep=-1, patience=1)
    with pytest.raises(StorageError, match=r"ep1-ba30/__0_0.distcp: its rank hasn't uploaded it"):
        uploads._upload(place / "__0_0.distcp")
    assert set(folder.listing()) == {NAME}
    assert (place / ".metadata").exists()
    (place / "__1_0.distcp").rename(place / "__0_0.distcp")
    uploads._upload(place / "__0_0.distcp")
    assert (newest(folder), list(place.iterdir())) == ("ep1-ba30", [])
    uploads.end()
    lease.release()
