import subprocess
import sys

from sit_composer.config.schema import documentation
from tests.helpers.paths import ROOT

PAGE = ROOT / "docs" / "configuration.md"


def test_the_page_of_keys_is_current():
    page = subprocess.run(
        [sys.executable, "docs/configuration.py"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert PAGE.read_text() == page.stdout, "run: python docs/configuration.py > docs/configuration.md"


def test_help_and_page_tell_default_meaning_and_bounds_of_a_key():
    row = "| `lr` | `0.0001` | learning rate | a number above 0 |"
    assert row in PAGE.read_text().splitlines()
    line = "  optimizer.lr                 learning rate (a number above 0) [0.0001]"
    assert line in documentation().splitlines()
