"""What users get to read about a store, whichever client asked: boto3, streaming's, or pyarrow's."""

import pytest

from convert.sources.s3 import list_remote
from sit_composer.data.stream import read_text
from sit_composer.errors import UserError
from sit_composer.storage import S3Folder

ASKED = {
    "--out and save_folder": lambda uri: S3Folder(uri).listing(),
    "data.remote": lambda uri: read_text(uri, "", "spec.json", attempts=1),
    "SOURCE": list_remote,
}


def told(uri):
    """The errors of all three, by what asks."""
    lines = {}
    for what, ask in ASKED.items():
        with pytest.raises(UserError) as raised:
            ask(uri)
        lines[what] = str(raised.value)
        assert len(lines[what].splitlines()) == 1
    return lines


def test_a_missing_bucket_or_credential_is_told_by_all_clients(s3, monkeypatch, tmp_path):
    assert all("bucket does not exist" in line for line in told("s3://no-bucket/x").values())
    variables = "credentials are read from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert all(variables in line for line in told("s3://sit/x").values())
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    assert all(variables in line for line in told("s3://sit/x").values())


def test_each_variable_of_the_address_serves_all_clients(s3, monkeypatch):
    s3.client.put_object(Bucket="sit", Key="x/spec.json", Body=b"[]")
    monkeypatch.delenv("S3_ENDPOINT_URL")
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.setenv(name, s3.url)
        assert S3Folder("s3://sit/x").listing() == {"spec.json": 2}
        assert list_remote("s3://sit/x") == (["s3://sit/x/spec.json"], True)
        assert read_text("s3://sit/x", "", "spec.json") == ("[]", "s3://sit/x/spec.json")
        monkeypatch.setenv(name, "127.0.0.1:9")
        assert all(line.startswith(f"{name}: got ") for line in told("s3://sit/x").values())
        monkeypatch.delenv(name)
