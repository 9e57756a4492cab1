from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from msae.base.config import read_toml, settings_from, to_mapping
from msae.base.errors import ConfigError


@dataclass(frozen=True)
class Settings:
    kind: Literal["topk", "relu"] = "topk"
    levels: tuple[int, ...] | None = None
    lr: float = 0.1
    epochs: int = 3
    resume: bool = False
    out: Path | None = None


def test_mapping_and_back():
    settings = settings_from(Settings, None, {"levels": [1, 2], "lr": 1, "out": "a/b"}, where="x")
    assert settings == Settings(levels=(1, 2), lr=1.0, out=Path("a/b"))
    assert settings_from(Settings, None, to_mapping(settings), where="x") == settings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epoch": 3}, "f.toml: unknown setting 'epoch'; did you mean 'epochs'"),
        ({"epochs": "three"}, "f.toml: epochs = 'three' is text; give a whole number"),
        ({"epochs": True}, "epochs = True is true or false; give a whole number"),
        ({"epochs": 2.5}, "epochs = 2.5 is a number; give a whole number"),
        ({"kind": "topp"}, "kind = 'topp' is not one of topk, relu; did you mean 'topk'"),
        ({"levels": [1, "x"]}, "levels = [1, 'x'] is a list; give a list, each a whole number"),
        ({"resume": 1}, "resume = 1 is a whole number; give true or false"),
        ({"out": 3}, "out = 3 is a whole number; give text"),
    ],
)
def test_wrong_values_are_named(values, message):
    with pytest.raises(ConfigError) as caught:
        settings_from(Settings, None, values, where="f.toml")
    assert message in str(caught.value)


def test_toml_errors_name_file_and_line(tmp_path):
    file = tmp_path / "f.toml"
    file.write_text("lr = = 3")
    with pytest.raises(ConfigError, match=r"f\.toml is not readable TOML .*line 1"):
        read_toml(file)
    with pytest.raises(ConfigError, match="does not exist"):
        read_toml(tmp_path / "g.toml")
