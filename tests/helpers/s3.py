"""A real S3 on loopback."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path


class SeaweedFS:
    """SeaweedFS on loopback, with one bucket. Its data outlive `stop`."""

    def __init__(self, folder):
        self.folder = folder
        self.process = None
        self.ready = False
        self._choose_ports()

    def _choose_ports(self):
        self.ports = free_ports(5)
        self.url = f"http://127.0.0.1:{self.ports[0]}"

    def start(self, attempts=5):
        import boto3
        from botocore.config import Config

        names = ("s3", "master", "volume", "filer", "admin")
        ports = [f"-{name}.port={port}" for name, port in zip(names, self.ports, strict=True)]
        weed = [Path(sys.executable).parent / "weed", "-logtostderr=true", "mini", f"-dir={self.folder}"]
        rest = ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-webdav=false", "-admin.ui=false", "-bucket=sit"]
        rest += ["-s3.port.iceberg=0", "-s3.port.lance=0", *ports]
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen([*weed, *rest], stdout=log, stderr=log, start_new_session=True)
        once = boto3.client("s3", endpoint_url=self.url, config=Config(retries={"total_max_attempts": 1}))
        # Just after a start, SeaweedFS at times answers "InternalError, please try again".
        self.client = boto3.client("s3", endpoint_url=self.url, config=Config(retries={"total_max_attempts": 9}))
        deadline = time.monotonic() + 30
        while True:
            try:
                once.put_object(Bucket="sit", Key="ready", Body=b"")
                self.ready = True
                return
            except Exception as error:
                # A test beside this one may have taken a port.
                if self.process.poll() is not None and not self.ready and attempts > 1:
                    self._choose_ports()
                    return self.start(attempts - 1)
                if time.monotonic() > deadline:
                    raise RuntimeError(f"SeaweedFS did not start: {(self.folder / 'log').read_text()}") from error
                time.sleep(0.1)

    def start_empty(self):
        """Starts it if it doesn't run, and empties its bucket."""
        if self.process is None or self.process.poll() is not None:
            self.start()
        for page in self.client.get_paginator("list_objects_v2").paginate(Bucket="sit"):
            if keys := [{"Key": entry["Key"]} for entry in page.get("Contents", [])]:
                self.client.delete_objects(Bucket="sit", Delete={"Objects": keys})
        self.client.delete_bucket(Bucket="sit")  # with its empty folders and unfinished uploads
        with suppress(self.client.exceptions.BucketAlreadyOwnedByYou):  # by an attempt whose answer was an error
            self.client.create_bucket(Bucket="sit")

    def stop(self):
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def keys(self, prefix):
        found = self.client.list_objects_v2(Bucket="sit", Prefix=f"{prefix}/").get("Contents", [])
        return [entry["Key"] for entry in found]

    def contents(self, prefix):
        read = {key: self.client.get_object(Bucket="sit", Key=key)["Body"].read() for key in self.keys(prefix)}
        return {key.rpartition("/")[2]: data for key, data in read.items()}


def free_ports(count):
    """Ports that are free, as is each plus 10,000, where SeaweedFS listens for gRPC."""
    found = []
    while len(found) < count:
        port = random.randint(15_000, 22_000)
        try:
            for number in (port, port + 10_000):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", number))
            found.append(port)
        except OSError:
            continue
    return found
