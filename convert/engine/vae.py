"""What the config.json of --vae's autoencoder says, and --statistics' file. They are read before the weights, which
take seconds to load."""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import NamedTuple

from convert.engine.plan import digest
from convert.sources.parts import InputError
from sit_composer.autoencoder_config import CLASSES, EXPECTED, Layout, read_layout
from sit_composer.cli import is_hub_name
from sit_composer.errors import first_line


class VaeConfig(NamedTuple):
    """The config.json of an autoencoder."""

    vae: str  # a folder, or a name on the Hub
    name: str  # of the file: a pipeline's autoencoder has a folder of its own
    file: Path
    layout: Layout

    def check_size(self, image_size: int) -> None:
        """Raises InputError unless images of this size have latents."""
        if fault := self.layout.size_fault(image_size):
            raise InputError(f"--image-size: {fault}")

    def identity(self) -> dict[str, str]:
        """What the autoencoder's name means now, as it may later mean another one: a folder's digest, or a commit."""
        if not os.path.isdir(self.vae):
            return {"vae_commit": self.file.parents[self.name.count("/")].name}  # .../snapshots/COMMIT/config.json
        hashes = []
        for path in sorted(path for path in Path(self.vae).rglob("*") if path.suffix in (".json", ".safetensors")):
            with open(path, "rb") as opened:
                hashes.append([str(path.relative_to(self.vae)), hashlib.file_digest(opened, "sha256").hexdigest()])
        return {"vae_digest": digest(hashes)}


def check_vae(vae: str, image_size: int | None) -> None:
    """Raises InputError for what is neither an autoencoder's folder nor a name on the Hub, or for an unsuitable size;
    without network."""
    if os.path.isdir(vae):
        config = find_config(vae)
        if image_size:
            config.check_size(image_size)
    elif not is_hub_name(vae):
        expected = "expected an existing folder, or a name on the Hub, such as stabilityai/sd-vae-ft-ema"
        raise InputError(f"--vae: got {vae!r}, {expected}")


def find_config(vae: str) -> VaeConfig:
    """The config of an autoencoder, or of a pipeline's. Raises InputError if there is none."""
    reasons, offline = [], False
    for name in ("config.json", "vae/config.json"):
        try:
            file = Path(vae, name) if os.path.isdir(vae) else _download(vae, name, offline)
            content = json.loads(file.read_text("utf-8"))
            if content["_class_name"] in CLASSES:
                return VaeConfig(vae, name, file, read_layout(content["_class_name"], content))
            reasons.append(f"its {name} is of {content['_class_name']}")
        except (KeyError, TypeError):
            reasons.append(f"its {name} is of no class")
        except Exception as error:  # the Hub's library raises a dozen kinds
            offline |= type(error).__name__ == "LocalEntryNotFoundError"
            reasons.append(getattr(error, "strerror", None) or first_line(error))
    if offline:
        raise InputError(f"--vae: {vae!r} is not a folder here, and the Hub, which may have it, can't be reached")
    found = f"{reasons[0]} (and in its folder vae: {reasons[1]})"
    raise InputError(f"--vae: {vae!r} has no autoencoder: {found}; {EXPECTED}")


def _download(vae: str, name: str, offline: bool) -> Path:
    from huggingface_hub import hf_hub_download  # only a name on the Hub needs it

    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # it logs each of five attempts to reach the Hub
    return Path(hf_hub_download(vae, name, local_files_only=offline))
