from sit_composer.config.documentation import documentation, markdown
from tests.helpers.paths import ROOT


def test_the_page_of_keys_is_current():
    text = (ROOT / "docs" / "configuration.md").read_text()
    assert text == markdown(), "run: python -m sit_composer.config.documentation > docs/configuration.md"


def test_help_and_page_tell_default_meaning_and_bounds_of_a_key():
    row = "| `lr` | `0.0001` | AdamW's learning rate | a number above 0 |"
    assert row in markdown().splitlines()
    line = "  optimizer.lr                 AdamW's learning rate (a number above 0) [0.0001]"
    assert line in documentation().splitlines()
