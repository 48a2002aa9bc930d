"""A small file system."""

import shutil
from pathlib import Path


class Disk:
    """A file system of its own, of four megabytes."""

    def __init__(self, path: Path):
        self.path = path

    def fill(self, free: int) -> None:
        """Leaves that many bytes."""
        with open(self.path / "filler", "wb") as filler:
            filler.write(bytes(shutil.disk_usage(self.path).free - free))

    def clear(self) -> None:
        (self.path / "filler").unlink()
