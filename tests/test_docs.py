"""README and docs: commands have flags that exist, links lead somewhere, named functions and messages are in the code.

The tutorial's commands are run, in their order, on simulated slices.
"""

import ast
import contextlib
import importlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
from PIL import Image
from tiny_runs import FLAGS

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("*/README.md")])
FOLDERS = "--data t/data --tiles t/tiles --panels t/panels"
NOT_OURS = "not run here"  # a block that says so downloads something, by other programs


def code_blocks(text: str) -> list[str]:
    """Indented and fenced blocks of a page, without the fences; those that call other programs are left out."""
    fenced = re.findall(r"(?ms)^```\w*\n(.*?)^```$", text)
    rest = re.sub(r"(?ms)^```\w*\n.*?^```$", "", text)
    indented = re.findall(r"(?m)(?:^    .*\n?)+", rest)
    return [block for block in (*indented, *fenced) if NOT_OURS not in block]


def commands(text: str) -> list[list[str]]:
    """Words of each line of a page's code blocks that runs something of this repository: [what, flags ...]."""
    found = []
    for block in code_blocks(text):
        for line in re.sub(r"\\\n", " ", block).splitlines():
            with contextlib.suppress(ValueError):  # a quotation mark without its partner: no command
                words = shlex.split(line, comments=True)
                starts = [i for i, word in enumerate(words) if re.fullmatch(r"(benchmarks/)?\w+\.py", word)]
                modules = [
                    i + 1 for i, word in enumerate(words[:-1]) if word == "-m" and words[i + 1].startswith("utils.")
                ]
                first = Path(words[0]).name if words else ""
                if (first in ("python", "torchrun", "accelerate") or words[:1] == ["run"]) and (starts or modules):
                    found.append(words[min(starts + modules) :])
    return found


def every_command() -> list:
    return [
        pytest.param(words, id=f"{page.stem}: {' '.join(words)[:70]}")
        for page in PAGES
        for words in commands(page.read_text())
    ]


def test_commands_are_found():
    text = (
        "    python a.py --b \\\n        1    # c\n\n```bash\npython -m utils.d x\n```\n`python e.py`\n    sed a.py\n"
    )
    assert commands(text) == [["a.py", "--b", "1"], ["utils.d", "x"]]
    assert commands("```bash\n# not run here\npython a.py\n```\n") == []
    assert commands("    .venv/bin/python a.py --b\n    run -m utils.c\n") == [["a.py", "--b"], ["utils.c"]]
    names = {words[0] for page in PAGES for words in commands(page.read_text())}
    assert {"train_mymodel.py", "train_decoder.py", "predict_slide.py", "utils.doctor"} <= names


def tiny_run() -> list[list[str]]:
    """The commands of .ci/tiny_run, its variables filled in."""
    text = (ROOT / ".ci/tiny_run").read_text().replace("\\\n", " ").replace("$folders", FOLDERS).replace("$tiny", "t")
    return commands("".join(f"    {line}\n" for line in text.splitlines()))


def demo() -> list[list[str]]:
    """The commands of `make demo`, its variables filled in."""
    done = subprocess.run(["make", "-n", "-B", "demo"], cwd=ROOT, capture_output=True, text=True, check=True)
    return commands("".join(f"    {line}\n" for line in done.stdout.replace("\\\n", " ").splitlines()))


@pytest.mark.parametrize("source", [tiny_run, demo])
def test_the_commands_of_the_demo_and_of_the_tiny_run_have_flags_that_exist(source):
    steps = source()
    published = ["image_tilling", "make_decoder_data", "train_mymodel", "train_decoder", "get_accuracy_image"]
    scripts = [words[0] for words in steps if words[0].endswith(".py")]
    assert scripts[:6] == [f"{name}.py" for name in (*published, "decoder_similarity")]
    assert steps[0][0] == "utils.simulation" and "utils.report" in [words[0] for words in steps]
    with mock.patch.dict(os.environ):
        for words in steps:
            module_of(words[0]).parse_args(words[1:])


@pytest.mark.slow
def test_the_tiny_run_runs(tmp_path):
    done = subprocess.run([ROOT / ".ci/tiny_run", sys.executable, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == f"all of it ran: {tmp_path}", done.stderr[-2000:]
    assert (tmp_path / "report.html").exists() and (tmp_path / "predicted/report.html").exists()


NEEDS = ("run by a test", "own data", "download", "GPU")
PROGRAMS = r"(?m)^    (?:\S*/)?(?:python|pip|make|git|conda|hf|accelerate|torchrun|uv) "


def test_the_index_says_of_each_page_what_its_commands_need():
    rows = re.findall(r"(?m)^\| \[[^]]*\]\(([^)]*)\) \| [^|]* \| ([^|]*) \|$", (ROOT / "docs/README.md").read_text())
    said = {(ROOT / "docs" / page).resolve().relative_to(ROOT): needs for page, needs in rows}
    pages = {path.relative_to(ROOT) for path in [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"]}
    assert pages - {Path("docs/README.md")} <= said.keys()
    for page, needs in said.items():
        text = (ROOT / page).read_text()
        if commands(text) or re.search(PROGRAMS, text):
            assert any(need in needs for need in NEEDS), page


def help_of(script: str) -> str:
    with pytest.raises(SystemExit), contextlib.redirect_stdout(io.StringIO()) as shown, mock.patch.dict(os.environ):
        module_of(script).parse_args(["--help"])
    return shown.getvalue()


def test_flags_behind_a_scripts_name_in_running_text_exist():
    named: dict[str, dict[str, str]] = {}
    for page in PAGES:
        for script, rest in re.findall(r"`(?:python )?(\w+\.py) ([^`]*)`", page.read_text()):
            if (ROOT / script).exists():
                flags = re.findall(r"--\w+", rest.split(".py")[0])
                named.setdefault(script, {}).update(dict.fromkeys(flags, page.name))
    assert len(named) > 3
    for script, flags in named.items():
        known = set(re.findall(r"--\w+", help_of(script)))
        assert {flag: page for flag, page in flags.items() if flag not in known and page != "CHANGELOG.md"} == {}, (
            script
        )


def module_of(what: str):
    """What a command runs: a script, a module, or the command of a package."""
    name = what.removesuffix(".py").replace("/", ".")
    package = (ROOT / name.replace(".", "/") / "__main__.py").exists()
    return importlib.import_module(f"{name}.__main__" if package else name)


@pytest.mark.parametrize("words", every_command())
def test_every_command_has_flags_that_exist(words, capsys):
    parse = getattr(module_of(words[0]), "parse_args", None)
    if parse is None:
        pytest.skip(f"{words[0]} has no parse_args to ask")
    with mock.patch.dict(os.environ):  # predict_slide.py sets variables of its process there
        parse(words[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http:", "https:")):
            path, _, heading = target.partition("#")
            there = page.parent / path if path else page
            assert there.exists(), target
            if heading:
                titles = re.findall(r"(?m)^#+ (.*)", there.read_text())
                assert heading in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_make_targets_that_pages_name_exist():
    targets = set(re.findall(r"(?m)^([\w-]+):", (ROOT / "Makefile").read_text()))
    for page in PAGES:
        named = re.findall(r"(?m)(?:`|^    )make (?:\w+=\S+ )?([\w-]+)", page.read_text())
        assert set(named) <= targets, page


# ---- docs/method.md: each equation and where it stands


def defined(path: Path, dotted: str) -> bool:
    """Whether a file defines a function, or a class and its method."""
    body = ast.parse(path.read_text()).body
    for name in dotted.split("."):
        kinds = (ast.FunctionDef, ast.ClassDef)
        body = next((node.body for node in body if isinstance(node, kinds) and node.name == name), None)
        if body is None:
            return False
    return True


def test_every_place_that_method_md_names_exists():
    places = re.findall(r"`([\w/]+\.py):([\w.]+)`", (ROOT / "docs/method.md").read_text())
    assert len(places) > 50
    assert [place for place in places if not defined(ROOT / place[0], place[1])] == []
    assert defined(ROOT / "model/losses.py", "distilled_target") and not defined(ROOT / "model/losses.py", "target")


def test_every_module_of_the_model_is_in_method_md():
    text = (ROOT / "docs/method.md").read_text()
    not_equations = {"__init__", "image_weights", "scbert"}  # files of weights, which other pages describe
    modules = {path.stem for path in (ROOT / "model").glob("*.py")} - not_equations
    assert {name for name in modules if f"model/{name}.py:" not in text} == set()


def test_constants_that_method_md_states_are_those_of_the_code():
    from model import gene_encoder, momentum, performer
    from utils.evaluation import ridge
    from utils.features import neighbourhoods
    from utils.training import augment, initialisation

    text = (ROOT / "docs/method.md").read_text()
    assert (performer.N_FEATURES, performer.HEAD_WIDTH, performer.EPSILON) == (266, 64, 1e-4)
    assert (momentum.MAX_MOMENTUM, gene_encoder.N_BINS, initialisation.REST) == (0.995, 7, 0.02)
    assert (neighbourhoods.MIN_SPOTS, neighbourhoods.MIN_SD, neighbourhoods.CONTEXT_PITCHES) == (64, 1e-3, 2.6)
    assert (augment.SHIFT, augment.JITTER, ridge.RANKS) == (0.05, 0.15, (5, 10, 20, 40, None))
    assert next(i for i in range(9999) if momentum.momentum_at(i) == 0.995) == 1790 and "step 1,790" in text


# ---- docs/troubleshooting.md: messages as the code has them


@cache
def messages() -> str:
    """Every string of the sources, one a line; what an f-string fills in is a tab."""
    found = []
    for path in [
        *ROOT.glob("*.py"),
        *(ROOT / "model").rglob("*.py"),
        *(ROOT / "utils").rglob("*.py"),
        ROOT / "Makefile",
    ]:
        if path.name == "Makefile":
            found.append(path.read_text())
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\t" for part in node.values]
                found.append("".join(map(str, parts)).replace("\n", " "))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value.replace("\n", " "))
    return "\n".join(found).replace("`", "")


def quoted(page: str) -> list[str]:
    """What stands in backticks, or slanted, in the first column of the tables of symptoms."""
    rows = re.findall(r"(?m)^\| (.+?) \| .+ \|$", page)
    return [text for row in rows for text in re.findall(r"`([^`]+)`|(?<!\w)\*([^*]+)\*", row) for text in text if text]


def test_messages_in_troubleshooting_are_those_of_the_code():
    texts = quoted((ROOT / "docs/troubleshooting.md").read_text())
    assert len(texts) > 30
    missing = [text for text in texts for part in text.split("...") if part.strip() not in messages()]
    known = {"contrast", "matching", "Too many open files"}  # columns of the log, and the system's own message
    assert [text for text in missing if text not in known] == []


# ---- the tutorial, run


def tiny(what: str) -> list[str]:
    """Flags that make a command of the tutorial small."""
    script = what.removesuffix(".py")
    epochs = ["--Epoch", "1"] if script.startswith("train_") else []
    return [*FLAGS.get(script, "").split(), *epochs, *(["--workers", "0"] if script in FLAGS else [])]


@pytest.fixture(scope="module")
def followed(simulated, tmp_path_factory):
    """A folder in which the tutorial's commands were typed, one after the other; what each of them printed."""
    home, printed = tmp_path_factory.mktemp("tutorial"), {}
    shutil.copytree(simulated, home / "data" / "mine")
    Image.open(simulated / "P03_1" / "P03_1_he.jpg").save(home / "slide.tif")
    before = Path.cwd()
    os.chdir(home)
    try:
        main_way = (ROOT / "docs/tutorial.md").read_text().split("## A few hundred spots")[0]
        for words in commands(main_way):
            module = module_of(words[0])
            said = printed[" ".join(words)] = home / f"{len(printed)}.txt"
            small = (
                ["--um_per_px", "1", "--device", "cpu", "--precision", "fp32"]
                if words[0] == "predict_slide.py"
                else tiny(words[0])
            )
            with said.open("w") as file, contextlib.redirect_stdout(file), mock.patch.dict(os.environ):
                code = module.main(module.parse_args([*words[1:], *small]))
            assert not code, words
    finally:
        os.chdir(before)
    return home, {command: path.read_text() for command, path in printed.items()}


def test_the_tutorial_has_each_script_and_ends_with_its_reports(followed):
    home, printed = followed
    order = [command.split()[0] for command in printed]
    scripts = ["image_tilling", "make_decoder_data", "train_mymodel", "train_decoder", "get_accuracy_image"]
    assert order == ["utils.doctor"] * 2 + [f"{s}.py" for s in (*scripts, "decoder_similarity", "predict_slide")]
    for report in ("results/retrieval", "results/similarity", "predicted"):
        assert (home / report / "report.html").stat().st_size > 10_000
    for written in ("encoder_model/best_epoch_weights.pth", "decoder_model/best_epoch_weights.pth", "data/mine_tiles"):
        assert (home / written).exists()
    assert list((home / "logs/stage_one").glob("*/epoch_loss.png"))
    assert (home / "results/similarity/genes.csv").exists() and (home / "results/similarity/predictions.h5ad").exists()


def test_what_the_tutorial_says_to_look_at_is_printed(followed):
    printed = {command.split()[0]: text for command, text in followed[1].items()}
    assert "All in order" in printed["utils.doctor"] and "spots on it" in printed["utils.doctor"]
    assert re.search(
        r"contrast [\d.]+ \(chance [\d.]+\), matching [\d.]+ \(chance 0\.637\)", printed["train_mymodel.py"]
    )
    assert "R@5" in printed["train_mymodel.py"]
    assert re.search(r"warm start by ridge: .*validation PCC per gene", printed["train_decoder.py"])
    assert "reranked" in printed["get_accuracy_image.py"] and "ridge_neighbours" in printed["decoder_similarity.py"]


def test_the_citation_names_the_paper_and_the_version():
    text = (ROOT / "CITATION.cff").read_text()
    version = re.search(r'(?m)^version = "(.*)"', (ROOT / "pyproject.toml").read_text())[1]
    assert re.search(rf"(?m)^version: {re.escape(version)}$", text) and "doi: 10.1093/bib/bbaf317" in text
    for key in ("cff-version: 1.2.0", "message:", "title:", "authors:"):  # those that the format asks for
        assert re.search(rf"(?m)^{key}", text)
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_figure_is_drawn_for_light_and_dark_and_describes_itself():
    from xml.etree import ElementTree

    root = ElementTree.parse(ROOT / "docs/method.svg").getroot()
    names = {element.tag.split("}")[-1] for element in root.iter()}
    assert {"title", "desc", "text", "style"} <= names and "image" not in names
    assert "prefers-color-scheme: dark" in (ROOT / "docs/method.svg").read_text()
