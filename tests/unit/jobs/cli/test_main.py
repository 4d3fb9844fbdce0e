"""The command line: exit codes, one line per mistake, help that is there at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from jobs.cli.main import app, main
from jobs.cli.options import Stage
from jobs.errors import Interrupted, SpecErrors, StageFailed
from jobs.spec.load import load_spec, recipes

COMMANDS = ["init", "run", "plan", "submit", "manifest", "list", "status", "watch", "logs", "stop"]
COMMANDS += ["quantize", "export", "generate", "report", "schema"]
GOOD = """\
name: a-run
teacher: {model: org/big}
student: {model: org/small}
data: {train: [{source: "texts/*.txt"}]}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """The lines on stderr of a command that must end with exit code 2."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and all(line.startswith("error: ") for line in err.splitlines())
    return err.splitlines()


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stands in for the pipeline, which is tested with a cluster: keeps its calls."""
    calls: list[Any] = []
    module = ModuleType("jobs.pipeline.pipeline")

    def run_pipeline(spec: Any, **options: Any) -> int:
        calls.append((spec, options))
        outcome = options["address"]
        if outcome == "auto":
            raise StageFailed("capture", "out of\nmemory", "runs/a/log", "stillhouse run a.yaml")
        return 0

    module.run_pipeline = run_pipeline  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "jobs.pipeline.pipeline", module)
    return calls


# -- help --------------------------------------------------------------------------------------


def test_the_command_line_starts_light() -> None:
    code = (
        "import sys, jobs.cli.main\n"
        "try: jobs.cli.main.main(['run', '--help'])\n"
        "finally: print([m for m in ('torch', 'transformers', 'ray', 'datasets', 'wandb', "
        "'yaml', 'fsspec', 'rich') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "[]"


def test_python_dash_m_is_stillhouse() -> None:
    out = subprocess.run(
        [sys.executable, "-m", "jobs", "run", "--loud"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[4],
    )
    assert (out.returncode, out.stdout) == (2, "")
    assert out.stderr == "error: No such option: --loud; see stillhouse run --help\n"


def test_the_commands_are_all_covered_here() -> None:
    names = [info.name or info.callback.__name__ for info in app.registered_commands]  # type: ignore[union-attr]
    assert names == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_that_parses(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"Example:\n    stillhouse {command}" in text
    # every option explains itself
    assert all(len(line.split()) > 1 for line in text.splitlines() if line.startswith("  --"))


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_lists_the_commands(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {command} " in text for command in COMMANDS)
    assert "Example:\n    stillhouse run demo" in text and "..." not in text.split("Commands:")[1]


# -- wrong arguments ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["rnu"], "No such command 'rnu'. Did you mean 'run'?; see stillhouse --help"),
        (["--loud"], "No such option: --loud; see stillhouse --help"),
        (["run"], "Missing argument 'SPEC'; see stillhouse run --help"),
        (["run", "x", "--loud"], "No such option: --loud; see stillhouse run --help"),
        (
            ["run", "x", "--until", "end"],
            "Invalid value for '--until': 'end' is not one of 'prepare', 'capture', 'distill', "
            "'sweep', 'summarize'; see stillhouse run --help",
        ),
        (["report"], "Missing argument 'RUN'; see stillhouse report --help"),
        (["init", "--teacher", "a"], "Missing option '--student'; see stillhouse init --help"),
        (["init", "--teacher", "a", "--student", " "], "--student: is empty; may be a model"),
        (["quantize"], "Missing argument 'MODEL'; see stillhouse quantize --help"),
        (
            ["export", "x", "--format", "gguf"],
            "Missing option '--out'; see stillhouse export --help",
        ),
        (
            ["export", "x", "--out", "y", "--format", "onnx"],
            "Invalid value for '--format': 'onnx' is not one of 'hf', 'gguf'; "
            "see stillhouse export --help",
        ),
        (
            ["generate", "x", "--max-new-tokens", "0"],
            "Invalid value for '--max-new-tokens': Input should be greater than or equal to 1; "
            "see stillhouse generate --help",
        ),
        (["schema", "x"], "Got unexpected extra argument(s) (x); see stillhouse schema --help"),
    ],
)
def test_a_usage_error_is_one_line(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told(capsys, *arguments) == [f"error: {line}"]


def test_a_missing_spec_names_what_is_there(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundled = ", ".join(recipes())
    assert told(capsys, "run", "x.yaml") == [
        f"error: x.yaml: no such file; no YAML file is there; bundled: {bundled}"
    ]
    Path("y.yaml").write_text(GOOD)
    assert told(capsys, "run", "x.yaml") == [
        f"error: x.yaml: no such file; there are y.yaml; bundled: {bundled}"
    ]


def test_all_mistakes_of_a_run_are_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.yaml").write_text(GOOD)
    arguments = "run a.yaml steps=1 x --address there --until prepare --only sweep"
    lines = told(capsys, *arguments.split())
    assert lines == [
        "error: --until and --only: may not be given together; see stillhouse run --help",
        'error: --address: got "there"; may be auto, local or HOST:PORT; see stillhouse run --help',
        'error: override "x": may be key=value, e.g. distill.steps=100',
        "error: steps: unknown key; did you mean distill.steps or sweep.recover.steps?",
    ]


# -- run ---------------------------------------------------------------------------------------


def test_run_hands_the_spec_to_the_pipeline(pipeline: list[Any]) -> None:
    Path("a.yaml").write_text(GOOD)
    arguments = "run a.yaml distill.steps=5 --address 10.0.0.1:6379 --until capture --redo prepare"
    assert main(arguments.split()) == 0
    ((spec, options),) = pipeline
    assert spec == load_spec("a.yaml", ["distill.steps=5"])
    assert options == {
        "address": "10.0.0.1:6379",
        "until": "capture",
        "only": None,
        "redo": "prepare",
    }
    assert main(["run", "a.yaml", "--only", "sweep"]) == 0
    assert pipeline[1][1] == {"address": None, "until": None, "only": "sweep", "redo": None}
    assert [stage.value for stage in Stage] == [
        "prepare",
        "capture",
        "distill",
        "sweep",
        "summarize",
    ]


def test_a_bundled_recipe_runs_by_name(pipeline: list[Any]) -> None:
    assert main(["run", "qwen3-8b-to-0.6b"]) == 0
    assert pipeline[0][0].name == "qwen3-8b-to-0.6b"


def test_a_failed_stage_tells_where_to_look_and_how_to_go_on(
    pipeline: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("a.yaml").write_text(GOOD)
    assert main(["run", "a.yaml", "--address", "auto"]) == 3
    assert capsys.readouterr().err.splitlines() == [
        "error: capture failed: out of memory",
        "log: runs/a/log",
        "continue with: stillhouse run a.yaml",
    ]


@pytest.mark.parametrize(
    ("raised", "code", "lines"),
    [
        (SpecErrors(["a: b", "c: d"]), 2, ["error: a: b", "error: c: d"]),
        (ValueError("storage: empty"), 2, ["error: storage: empty"]),
        (Interrupted("at step 5"), 130, ["error: interrupted: at step 5"]),
        (Interrupted(), 130, ["error: interrupted"]),
        (KeyboardInterrupt(), 130, []),
        (PermissionError(13, "Permission denied", "/x"), 3, ["error: Permission denied: /x"]),
    ],
)
def test_exit_codes(
    raised: BaseException,
    code: int,
    lines: list[str],
    pipeline: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any, **__: Any) -> int:
        raise raised

    monkeypatch.setattr(sys.modules["jobs.pipeline.pipeline"], "run_pipeline", fail)
    assert main(["run", "qwen3-8b-to-0.6b"]) == code
    assert capsys.readouterr().err.split() == " ".join(lines).split()


@pytest.mark.parametrize("raised", [KeyError("k"), ValueError("two\nlines"), ValueError()])
def test_a_defect_keeps_its_trace(
    raised: Exception,
    pipeline: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any, **__: Any) -> int:
        raise raised

    monkeypatch.setattr(sys.modules["jobs.pipeline.pipeline"], "run_pipeline", fail)
    assert main(["run", "qwen3-8b-to-0.6b"]) == 3
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and "error: this is a defect of stillhouse" in err


# -- init and schema ---------------------------------------------------------------------------


def test_init_writes_a_spec_and_never_over_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["init", "--teacher", "org/Big", "--student", "org/Small"]
    assert main(arguments) == 0
    assert capsys.readouterr().out == (
        "wrote big-to-small.yaml; next: stillhouse run big-to-small.yaml\n"
    )
    spec = load_spec("big-to-small.yaml")
    assert spec.data is not None and spec.data.train[0].source == "builtin:python-docs"
    Path("big-to-small.yaml").write_text("mine")
    assert told(capsys, *arguments) == [
        "error: big-to-small.yaml: exists; give --force to overwrite it, or --out FILE"
    ]
    assert Path("big-to-small.yaml").read_text() == "mine"
    assert main([*arguments, "--force", "--data", "x/*.txt"]) == 0
    assert load_spec("big-to-small.yaml").data.train[0].source == "x/*.txt"  # type: ignore[union-attr]
    capsys.readouterr()
    assert told(capsys, *arguments, "--out", "no/such.yaml") == [
        "error: no/such.yaml: cannot be written: No such file or directory"
    ]


def test_schema_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["$schema"].endswith("2020-12/schema")
    assert schema["properties"]["name"]["pattern"] == "^[a-z0-9][a-z0-9._-]{0,62}$"


# -- report ------------------------------------------------------------------------------------


def make_run(folder: Path) -> None:
    (folder / "evaluations").mkdir(parents=True)
    (folder / "spec.yaml").write_text(GOOD.replace("a-run", folder.name))
    numbers = {
        "parameters": 1000,
        "bytes": 2000,
        "accuracy": 0.5,
        "perplexity": 12.5,
        "kl_to_teacher": 0.1,
        "retention": 98.0,
        "top1_agreement": 0.8,
        "decode_tokens_per_s": 10.0,
        "prefill_tokens_per_s": 100.0,
        "versions": {},
    }
    (folder / "evaluations" / "student.json").write_text(
        json.dumps({"role": "student", "name": "org/small", **numbers})
    )


def test_report_by_name_path_and_url(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(folder / "runs" / "one")
    make_run(folder / "elsewhere" / "two")
    url = f"file://{folder}/elsewhere/two"
    assert main(["report", "one", "elsewhere/two"]) == 0
    out = capsys.readouterr().out
    assert f"report: {folder}/runs/one/report/index.html" in out
    assert f"report: {folder}/elsewhere/two/report/index.html" in out
    assert "12.5" in out
    for place in (folder / "runs" / "one", folder / "elsewhere" / "two"):
        assert {file.name for file in (place / "report").iterdir()} == {
            "index.html",
            "table.md",
            "results.json",
        }
    assert main(["report", url]) == 0
    assert main(["report", "two", "--storage", "elsewhere"]) == 0


def test_an_unknown_run_names_those_there_are(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hint = "see stillhouse report --help"
    assert told(capsys, "report", "one", "../x") == [
        f"error: one: no such run; ./runs holds no runs; {hint}",
        f"error: ../x: no such run; ./runs holds no runs; {hint}",
    ]
    for name in ("alpha", "qwen-small", "_logits"):
        make_run(folder / "runs" / name)
    (folder / "runs" / "empty").mkdir()
    there = "the runs in ./runs are"
    assert told(capsys, "report", "qwen-smal", "runs", ".") == [
        f"error: qwen-smal: no such run; {there} qwen-small, alpha; {hint}",
        f"error: runs: no such run; {there} alpha, qwen-small; {hint}",
        f"error: .: no such run; {there} alpha, qwen-small; {hint}",
    ]
    (line,) = told(capsys, "report", "a", "--storage", "s3:bucket")
    assert line.startswith("error: storage: s3:bucket is no URL")
