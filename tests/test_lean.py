"""What the light imports rely on in Composer and streaming; a change of these libraries fails here."""

import subprocess
import sys

import pytest
from composer.loggers import mosaicml_logger
from composer.utils import get_free_tcp_port

from sit_composer import launch
from tests.helpers.paths import ROOT

UNUSED = {"transformers", "scipy", "sklearn", "pandas", "matplotlib", "paramiko", "mcli", "diffusers", "timm"}
TRAINING = """
from sit_composer import lean
lean.load("composer", "streaming")
import sit_composer.training.fit, sys
print(*sys.modules)
import streaming.vision, transformers, scipy.signal  # whoever wants them still finds the real ones
print(streaming.vision.StreamingCIFAR10, transformers.BatchEncoding, scipy.signal.windows)
"""
AFTER_SCIPY = """
import scipy, sklearn, transformers
from sit_composer import lean
lean.load("torch", "composer", "streaming")
import sit_composer.training.fit
print()
"""
CONVERSION = """
from sit_composer import lean
lean.load("streaming")
import convert.engine.conversion, convert.engine.shards, sys
print(*sys.modules)
"""
LAUNCHING = """
from sit_composer import launch
import sys
launcher = launch.composer_launcher()
print(*sys.modules)
assert launcher.torch.cuda.device_count() >= 0  # the real one, once it is needed
assert callable(launcher.main) and launcher._monitor_processes and launcher._print_process_exit_status
"""


@pytest.mark.parametrize(
    ("code", "unused"),
    [
        (TRAINING, UNUSED),
        (AFTER_SCIPY, set()),
        (CONVERSION, {*UNUSED, "torchvision", "sympy"}),
        (LAUNCHING, {*UNUSED, "torch", "composer"}),
    ],
    ids=["training", "where some are imported already", "conversion", "launching"],
)
def test_what_no_command_needs_is_not_imported(code, unused):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert unused & set(done.stdout.splitlines()[0].split()) == set()


def test_the_launchers_stand_ins_are_composers_own():
    launcher = launch.composer_launcher()
    for name in ("MOSAICML_GPU_LOG_FILE_PREFIX", "MOSAICML_LOG_DIR", "MOSAICML_PLATFORM"):
        assert getattr(launcher, f"{name}_ENV_VAR") == getattr(mosaicml_logger, f"{name}_ENV_VAR")
    assert 1024 < launch.free_port() < 65536
    assert isinstance(get_free_tcp_port(), int)
