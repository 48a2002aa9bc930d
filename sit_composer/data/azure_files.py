"""Downloads shards from az:// and abfs:// for streaming, which has clients of its own for other stores, gs:// included.

A DataLoader's workers are forked, and obstore's threads don't survive that: a request there would never return. So a
process of its own fetches each file, which takes 0.2 s longer.
"""

import os
import subprocess
import sys
from pathlib import Path

from streaming.base.storage import CloudDownloader
from streaming.base.storage.download import DOWNLOADER_MAPPINGS

from sit_composer.clouds import AZURE, TRY_AGAIN
from sit_composer.errors import StorageError


class AzureFiles(CloudDownloader):
    """Downloads files. A ConnectionError may pass; a StorageError stays."""

    @staticmethod
    def _client_identifier() -> str:
        return AZURE[0]

    def _validate_remote_path(self, remote: str) -> None:
        pass  # by `check_store`

    def clean_up(self) -> None:
        pass

    def _download_file_impl(self, remote: str, local: str, timeout: float) -> None:
        partial = f"{local}.{os.getpid()}"
        command = [sys.executable, "-m", "sit_composer.clouds", remote, partial]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            os.replace(partial, local)
            return
        Path(partial).unlink(missing_ok=True)
        reason = (done.stderr.strip().splitlines() or [f"{remote}: the download was killed"])[-1]
        raise ConnectionError(reason) if done.returncode in (TRY_AGAIN, -9) else StorageError(reason)


DOWNLOADER_MAPPINGS.update(dict.fromkeys(AZURE, AzureFiles))
