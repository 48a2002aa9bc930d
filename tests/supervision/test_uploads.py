import pytest

from sit_composer.checkpoint.folder import newest
from sit_composer.clouds import CloudFolder
from sit_composer.storage import S3Folder, StorageError, open_store
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


def test_a_rank_that_is_ahead_waits_until_the_checkpoint_before_is_complete(s3, tmp_path):
    """Else a kill could leave two checkpoints, none of them complete, and the run would not resume."""
    folder = S3Folder("s3://sit/ahead")
    lease = Lease(folder, BEAT)
    lease.acquire()
    for batch in (4, 8):
        (tmp_path / f"ep0-ba{batch}").mkdir()
        (tmp_path / f"ep0-ba{batch}" / "__1_0.distcp").write_bytes(b"shard")
    uploads = Uploads(folder, lease, keep=-1, patience=1)
    uploads._upload(tmp_path / "ep0-ba4" / "__1_0.distcp")
    with pytest.raises(StorageError, match=r"ep0-ba4/.metadata: its rank hasn't uploaded it"):
        uploads._upload(tmp_path / "ep0-ba8" / "__1_0.distcp")
    assert set(folder.listing()) == {NAME, "ep0-ba4/__1_0.distcp"}
    folder.write("ep0-ba4/.metadata", b"metadata")
    uploads._upload(tmp_path / "ep0-ba8" / "__1_0.distcp")
    assert "ep0-ba8/__1_0.distcp" in folder.listing()
    uploads.end()
    lease.release()


@pytest.mark.parametrize("size", [1000, 9_200_000])
def test_an_upload_by_obstore_that_began_before_a_takeover_does_not_appear_after_it(tmp_path, monkeypatch, size):
    obstore = pytest.importorskip("obstore", reason="the extra clouds is not installed")
    memory = obstore.store.MemoryStore()
    monkeypatch.setattr(CloudFolder, "_connect", lambda folder, patience: memory)
    folder = open_store("az://box/run")
    lease = Lease(folder, 60)
    lease.acquire()
    uploads = Uploads(folder, lease, keep=-1, patience=1)
    (tmp_path / "file").write_bytes(b"x" * size)
    real = obstore.open_writer

    def taken_over(*arguments, **options):
        folder.write(NAME, b'{"owner": "successor"}')
        return real(*arguments, **options)

    monkeypatch.setattr(obstore, "open_writer", taken_over)
    with pytest.raises(StorageError, match="another run has taken this one for dead"):
        uploads._patiently(uploads.folder.upload, tmp_path / "file", "ep0-ba2-rank0.pt")
    assert set(folder.listing()) == {NAME}
    uploads.end()
