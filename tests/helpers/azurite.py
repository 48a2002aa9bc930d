"""A real Azure Blob Storage on loopback: Azurite, which npm installs."""

import base64
import ctypes
import datetime
import hashlib
import hmac
import http.client
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

from filelock import FileLock

from tests.helpers.paths import ROOT

VERSION = "3.33.0"  # later ones have three times the packages, and send telemetry
PLACE = ROOT / ".pytest_cache" / f"azurite-{VERSION}"  # 121 MB, for all later tests
ACCOUNT = "devstoreaccount1"  # this and its key are Azurite's own, the same everywhere
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


def install() -> str:
    """The path of Azurite's command, or RuntimeError with the reason why there is none."""
    if found := shutil.which("azurite-blob"):
        return found
    command = PLACE / "node_modules" / ".bin" / "azurite-blob"
    npm = shutil.which("npm")
    PLACE.parent.mkdir(exist_ok=True)
    with FileLock(f"{PLACE}.lock"):
        if command.exists():
            return str(command)
        if npm is None:
            raise RuntimeError("npm is not installed, which installs Azurite")
        partial = PLACE.with_name(f"{PLACE.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        arguments = ["--no-audit", "--no-fund", "--loglevel=error", "--ignore-scripts", "--fetch-retries=1"]
        try:
            subprocess.run(
                [npm, "install", f"--prefix={partial}", *arguments, f"azurite@{VERSION}"],
                check=True, capture_output=True, text=True, timeout=240,
            )  # fmt: skip
        except subprocess.CalledProcessError as error:
            reason = (error.stderr.strip().splitlines() or ["no reason"])[0]
            raise RuntimeError(f"npm can't install Azurite: {reason}") from None
        except subprocess.TimeoutExpired:
            raise RuntimeError("npm can't install Azurite in 240 s") from None
        partial.rename(PLACE)
    return str(command)


def end_with_parent() -> None:
    """Linux's PR_SET_PDEATHSIG: a killed test leaves no server behind."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


class Azurite:
    """Azurite with one container, "box". Its data outlive `stop`."""

    def __init__(self, folder: Path):
        self.command = install()
        self.folder = folder
        self.process: subprocess.Popen | None = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/{ACCOUNT}"

    def start(self) -> None:
        if not self.port:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.port = probe.getsockname()[1]
        places = ["--blobHost", "127.0.0.1", "--blobPort", str(self.port), "--location", str(self.folder / "data")]
        rest = ["--silent", "--skipApiVersionCheck"]
        with open(self.folder / "log", "ab") as log:
            command = [self.command, *places, *rest]
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, preexec_fn=end_with_parent
            )
        deadline = time.monotonic() + 60
        while True:
            try:
                assert self._make_container("box") in (201, 409)
                return
            except OSError as error:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"Azurite did not start: {(self.folder / 'log').read_text()}") from error
                time.sleep(0.1)

    def _make_container(self, name: str) -> int:
        """Signs and makes the one request that obstore has no function for; returns the answer's status."""
        date = datetime.datetime.now(datetime.UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
        headers = {"x-ms-date": date, "x-ms-version": "2021-08-06"}
        signed = "".join(f"{name}:{value}\n" for name, value in headers.items())
        text = f"PUT{12 * chr(10)}{signed}/{ACCOUNT}/{ACCOUNT}/{name}\nrestype:container"
        digest = base64.b64encode(hmac.new(base64.b64decode(KEY), text.encode(), hashlib.sha256).digest()).decode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        headers |= {"Content-Length": "0", "Authorization": f"SharedKey {ACCOUNT}:{digest}"}
        connection.request("PUT", f"/{ACCOUNT}/{name}?restype=container", headers=headers)
        try:
            return connection.getresponse().status
        finally:
            connection.close()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
