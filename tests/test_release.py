"""What `make release-check` looks at: one version everywhere, packages with all that belongs in them and no more."""

from __future__ import annotations

import importlib.util
import shutil
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import hf_l2sp

ROOT = Path(__file__).parents[1]


def load_script() -> Any:
    spec = importlib.util.spec_from_file_location("release_check", ROOT / ".ci" / "release_check.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script()
VERSION = script.version_of_project((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_one_version():
    assert VERSION == version("hf-l2sp") == hf_l2sp.__version__
    script.check_changelog((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), VERSION)
    assert VERSION not in (ROOT / "hf_l2sp" / "__init__.py").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("## 1.1.0\n\n- A.\n", "The newest entry of CHANGELOG.md is 1.1.0, the version 1.2.0"),
        ("# Changelog\n", "is none"),
        ("## 1.2.0\n\nSoon.\n\n## 1.1.0\n\n- A.\n", "says nothing"),
    ],
)
def test_changelog_of_another_version(text, message):
    with pytest.raises(script.ReleaseError, match=message):
        script.check_changelog(text, "1.2.0")
    script.check_changelog("# Changelog\n\n## 1.2.0\n\nNew.\n\n- A.\n", "1.2.0")


def test_programs_of_the_readme_are_found():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    programs = script.readme_programs(readme)
    assert set(programs) == {"eval_f1_macro", "LayerDrift"} and all("hf_l2sp" in text for text in programs.values())
    assert script.drop_in_import(readme) == "from hf_l2sp import L2SPTrainer, L2SPTrainingArguments"
    with pytest.raises(script.ReleaseError, match="0 programs"):
        script.readme_programs("nothing")


@pytest.fixture
def wheel(tmp_path) -> Path:
    """A wheel made by hand."""
    about = f"hf_l2sp-{VERSION}.dist-info"
    path = tmp_path / "made.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted((ROOT / "hf_l2sp").rglob("*")):
            if file.is_file() and file.suffix != ".pyc":
                archive.write(file, file.relative_to(ROOT))
        head = f"Metadata-Version: 2.4\nName: hf-l2sp\nVersion: {VERSION}\nLicense-Expression: Apache-2.0\n"
        head += "Description-Content-Type: text/markdown\n\n"
        archive.writestr(f"{about}/METADATA", head + (ROOT / "README.md").read_text(encoding="utf-8"))
        archive.writestr(f"{about}/licenses/LICENSE", "text")
    return path


def test_a_whole_wheel_passes(wheel):
    script.check_wheel(wheel, VERSION)


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ("tests/test_x.py", "holds tests/test_x.py"),
        ("hf_l2sp/data.jsonl", "holds hf_l2sp/data.jsonl"),
        ("hf_l2sp/left_over.py", "differ: hf_l2sp/left_over.py"),
    ],
)
def test_a_wheel_with_more_is_refused(wheel, added, message):
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr(added, "")
    with pytest.raises(script.ReleaseError, match=message):
        script.check_wheel(wheel, VERSION)


@pytest.mark.parametrize("missing", ["hf_l2sp/py.typed", "hf_l2sp/API.md", "hf_l2sp/report.html"])
def test_a_wheel_with_less_is_refused(wheel, tmp_path, missing):
    less = tmp_path / "less.whl"
    with zipfile.ZipFile(wheel) as archive, zipfile.ZipFile(less, "w") as copy:
        for name in archive.namelist():
            if name != missing:
                copy.writestr(name, archive.read(name))
    with pytest.raises(script.ReleaseError, match=f"lacks {missing}"):
        script.check_wheel(less, VERSION)
    with pytest.raises(script.ReleaseError):
        script.check_wheel(wheel, "9.9.9")


@pytest.mark.parametrize(
    ("added", "removed", "message"), [("tests/test_x.py", "", "holds"), ("", "CHANGELOG.md", "lacks")]
)
def test_an_sdist_with_more_or_less_is_refused(tmp_path, added, removed, message):
    folder = tmp_path / "hf_l2sp-1"
    for name in (*script.IN_SDIST, *filter(None, [added])):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")

    def packed() -> Path:
        return Path(shutil.make_archive(str(tmp_path / "packed"), "gztar", tmp_path, folder.name))

    if removed:
        script.check_sdist(packed())
        (folder / removed).unlink()
    path = packed()
    assert tarfile.is_tarfile(path)
    with pytest.raises(script.ReleaseError, match=message):
        script.check_sdist(path)
