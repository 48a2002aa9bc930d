"""Makes this folder's fixtures with the code of commit 10cd1a6, before its reorganisation: what later code must read.

    cd CHECKOUT_OF_10cd1a6 && OMP_NUM_THREADS=1 .venv/bin/python PATH_TO_THIS_FOLDER/make.py

The code is that of the working directory; what is made lies beside this file, and replaces what was there:

  digits.parquet      80 digits of 8x8 pixels, the source of the next, and of the latents' first 32
  shards              their shards of pixels
  vae, latents        a small AutoencoderKL, and shards of its latents
  run                 a training's folder, with its config.yaml and checkpoints at batches 4 and 8
  sharded             a folder of the same training by two ranks under FSDP2, with the checkpoint at batch 8
  export              the folders that `sit_composer.export --hub` writes of run's last checkpoint
  samples             what `sit_composer.sample` had written of eight pictures when it was interrupted behind the fourth
  conversion          three Parquet files, and what their conversion had left when it was killed in the third part
  whole.safetensors   weights and average at batch 12 of a training that wasn't interrupted
  expected.json       the hashes, losses and arguments that belong to all of these, and where they were made

All commands ran with this folder as the working directory, and a copy of it can stand anywhere: paths are relative,
and where `to_mds.py` makes them absolute, they go through /proc/self/cwd. A test must first `settle` the copy, as git
doesn't keep the times of the sources; and its commands must have the copy as their working directory, and ENVIRONMENT:
the kernels that it names are on every x86-64 with AVX2, and so, it may be hoped, are the bits.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # of common.py and sources.py
import common
from sources import write_table, write_vae

HERE = Path(__file__).parent
COMMIT = "10cd1a6"
INTERRUPTED = """
import sys
from sit_composer import gallery, sample
write_png = gallery.write_png
def interrupted(picture, path):
    if path.name == "000004.png":
        raise KeyboardInterrupt
    write_png(picture, path)
gallery.write_png = interrupted
sys.exit(sample.main(sys.argv[1:]))
"""
KILLED = """
import os, signal, sys, time
sys.path.insert(0, os.environ["PYTHONPATH"] + "/convert")
import output, to_mds
put = output.Output.put
def killed(self, file):
    if file.name.startswith("shard.00002"):
        while not (self.partial / "part.00000.json").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    put(self, file)
output.Output.put = killed
to_mds.main(sys.argv[1:])
"""
LOSSES = "import json, sys, common; print('losses', json.dumps(common.train(sys.argv[1:])))"


def run(*command: Any, code: int = 0) -> str:
    environment = {**os.environ, **common.ENVIRONMENT, "PYTHONPATH": os.getcwd()}
    done = subprocess.run([*map(str, command)], cwd=HERE, env=environment, capture_output=True, text=True)
    if done.returncode != code:
        raise SystemExit(f"{command}: {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def make() -> None:
    code, python = Path.cwd(), sys.executable
    composer, quickstart = [Path(python).with_name("composer"), "-n"], code / "yamls" / "quickstart.yaml"
    for entry in HERE.iterdir():
        if entry.name not in ("make.py", "common.py", "sources.py", "__pycache__"):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    write_table(HERE / "digits.parquet", 0, 80)
    for number in range(3):
        write_table(HERE / "conversion" / "source" / f"{number}.parquet", 100 + 16 * number, 116 + 16 * number)
    write_vae(HERE / "vae")
    common.settle(HERE)
    convert = [python, code / "convert" / "to_mds.py"]
    run(*convert, *common.PIXELS, "--out", "shards")
    run(*convert, *common.LATENTS, "--out", "latents")
    run(python, "-c", KILLED, *common.CONVERSION, "--out", "conversion/shards", code=-9)
    run(*convert, *common.CONVERSION, "--out", "temporary")
    converted = common.hashes(HERE / "temporary")
    shutil.rmtree(HERE / "temporary")

    train = [*composer, 1, code / "sit_composer" / "train.py", quickstart]
    run(*train, *common.training("run", 8, 4))
    tell = [python, "-c", LOSSES, quickstart]
    told = {"losses": run(*tell, *common.training("whole", 20, 12))}
    told["latent_losses"] = run(*tell, *common.training("latent", 4, 4, common.LATENT_TRAINING))
    train = [*composer, 2, "-m", "tests.ranks", quickstart, "fsdp={}"]
    run(*train, *common.training("sharded", 8, 8))
    run(*train, *common.training("both", 12, 12))

    checkpoint = "run/ep1-ba8-rank0.pt"
    run(python, "-m", "sit_composer.export", checkpoint, "--out", "export", "--hub")
    sample = [checkpoint, *common.SAMPLING, "--out"]
    run(python, "-m", "sit_composer.sample", *sample, "temporary")
    pictures = common.hashes(HERE / "temporary", "*.png")
    shutil.rmtree(HERE / "temporary")
    run(python, "-c", INTERRUPTED, *sample, "samples", code=130)
    found = {name: json.loads(re.search(r"^losses (.*)", out, re.MULTILINE)[1]) for name, out in told.items()}
    record({"converted": converted, "pictures": pictures, **found})


def record(found: dict[str, Any]) -> None:
    """Writes what is expected of the later code, and removes what that was found from."""
    import torch
    from safetensors.torch import save_file

    whole, both = common.trained(HERE / "whole" / "ep2-ba12-rank0.pt"), common.trained(HERE / "both" / "ep2-ba12")
    weights = {f"{kind}.{name}": tensor for kind in ("training", "ema") for name, tensor in whole[kind].items()}
    save_file(weights, HERE / "whole.safetensors")
    content = {
        "commit": COMMIT, "processor": common.processor(), "kernels": torch.backends.cpu.get_cpu_capability(),
        "environment": common.ENVIRONMENT, **found,
        "whole": {kind: common.bits(tensors) for kind, tensors in whole.items()},
        "sharded": {kind: common.bits(tensors) for kind, tensors in both.items()},
    }  # fmt: skip
    (HERE / "expected.json").write_text(json.dumps(content, indent=1) + "\n")
    for name in ("whole", "both", "latent"):
        shutil.rmtree(HERE / name)


if __name__ == "__main__":
    os.environ.update(common.ENVIRONMENT)
    sys.path.insert(0, os.getcwd())
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    if not found.startswith(COMMIT):
        raise SystemExit(f"this is {found.strip()}, and not a checkout of {COMMIT}")
    make()
