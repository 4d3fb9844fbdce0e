"""Proof that a change of the code changes no result: records what a small job makes, twice.

    python -m tests.bench.golden [--base COMMIT]      (make golden BASE=COMMIT)

The working tree and COMMIT (default: the last commit of main) run the same commands on the same
inputs on this machine, one after the other: jobs of one process each, in float32, with fixed seeds.
What differs is printed, and makes the exit code 1. A record holds the losses of every step to the
last bit; hashes of the files of corpora, logit caches and answers, and of the tensors of students,
cells and exports; specs, fingerprints and results without times, speeds and memory; and what the
commands print: the schema, every --help, errors. At last the working tree continues a run that
COMMIT began and was stopped in.

Only commands and the files that users see are read, so the code may be laid out anew between the
two. Records of commits are kept in ~/.cache/stillhouse/golden, by kind of processor.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from tests.bench.timing import cpu_kind
from tests.fixtures.corpora import CHATML, CONTROLS, WORDS, write_chats, write_texts

CACHE = Path.home() / ".cache" / "stillhouse" / "golden"
ROOT = Path(__file__).resolve().parents[2]
VOCAB, LENGTH = 320, 64
SHOWN = 40  # differences that are printed
# Keys of JSON whose values are measured, or name a moment: they differ between two runs.
MEASURED = re.compile(
    r"^(t|began|ended|started|finished|seconds|time|attempt|versions|commit|host|node|pid|memory.*|"
    r"speed.*|prefill.*|decode.*|dense.*|energy.*|.*peak.*|baseline_dtype|.*resident_bytes|"
    r".*_s|.*_seconds|.*_hours|.*_ms)$"
)
# Fingerprints of files that hold such values.
OF_MEASURED = re.compile(r"/state/.*(growing\.outputs|outputs\.fingerprint|outputs\.cells\..*)$")
Record = dict[str, str]

BASE_SPEC: dict[str, Any] = {
    "storage": "runs",
    "teacher": {"model": "teacher", "dtype": "float32"},
    "student": {
        "init": "random",
        "config": {
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    },
    "data": {
        "train": [
            {"source": "texts/*.jsonl"},
            {"source": "chats/*.jsonl", "format": "messages", "weight": 2},
        ],
        "sequence_length": LENGTH,
        "select_sequences": 8,
        "report_sequences": 8,
    },
    "cache": {"method": "topk", "k": 16, "temperatures": [1.0, 2.0]},
    "distill": {
        "losses": {"forward_kl": 0.9, "ce": 0.1},
        "steps": 50,
        "tokens_per_step": 512,
        "learning_rate": 0.003,
        "dtype": "float32",
        "control": True,
        "evaluate_steps": 20,
    },
    "sweep": None,
    "resources": {"capture": {"workers": 1}, "distill": {"workers": 1}},
    "tracking": {"mode": "disabled"},
}
SWEEP = {
    "bits": [4, 2],
    "group_size": [32],
    "budgets_mb": [0.034],
    "recover": {"steps": 4, "bits": [2]},
    "dtype": "float32",
    "keep_models": "all",
    "speed_prompt_tokens": 16,
    "speed_decode_tokens": 4,
}
# Specs by name: what of the one above is another.
SPECS: dict[str, dict[str, Any]] = {
    "plain": {
        "teacher": None,
        "tokenizer": {"train": 400},
        "data": {"train": [{"source": "texts/*.jsonl"}], "packing": "concat"},
        "distill": {"losses": {"ce": 1.0}, "steps": 12, "control": False},
    },
    "job": {"sweep": SWEEP},
    "drawn": {
        "data": {"train": [{"source": "chats/*.jsonl", "format": "messages"}]},
        "responses": {"from": "teacher", "max_new_tokens": 16, "samples": 2, "top_p": 0.9},
        "cache": {"method": "sample", "draws": 12, "redraws": 2, "positions": "loss"},
        "distill": {"mode": "responses", "steps": 12, "control": False},
    },
    "online": {
        "student": {"init": "slice", "config": None, "layers": 1, "lora": {"r": 4}},
        "distill": {
            "mode": "online",
            "losses": {"forward_kl": 0.5, "reverse_kl": 0.3, "ce": 0.2},
            "steps": 12,
            "control": False,
        },
    },
}
# Commands after the jobs; what they print is recorded.
COMMANDS = (
    "generate runs/job/student --prompt bast --max-new-tokens 12 --temperature 0.7 --seed 3",
    "generate runs/job --cell hqq-4b-g32 --prompt bast --max-new-tokens 12 --prefer plain",
    "quantize runs/job/student --bits 3 --group-size 32 --embeddings --head --out quantized",
    "export runs/job --cell hqq-4b-g32 --format gguf --out exported-gguf",
    "export runs/job --cell hqq-4b-g32 --format hf --out exported-hf",
    "report job --max-mb 1",
    "plan job.yaml --gpu h200 --json",
    "manifest job.yaml --image image:1 --gpus-per-node 1 storage=s3://bucket/runs "
    "teacher.model=org/name data.train=[{source: builtin:python-docs}] sweep=null",
    "cache ls runs",
    "cache info job.yaml",
    "cache verify job.yaml",
    "list --json",
    "run job.yaml",
)
# Wrong inputs; what is said of them, and the exit code, are recorded.
ERRORS = (
    "run nowhere.yaml",
    "run job.yaml distil.steps=3",
    "run job.yaml distill.steps=none",
    "run job.yaml distill.steps=0 sweep.bits=[9] cache.k=0",
    "run job.yaml student.model=nowhere student.init=pretrained student.config=null",
    "run job.yaml teacher=null",
    "run job.yaml data.train=[]",
    "run job.yaml data.train=[{source: nothing/*.txt}]",
    "run job.yaml data.train=[{source: texts/*.jsonl, column: body}]",
    "run job.yaml data.sequence_length=100000",
    "run job.yaml sweep.group_size=[24]",
    "run job.yaml sweep.budgets_mb=[0]",
    "run job.yaml sweep.recover={steps: 0}",
    "run job.yaml sweep.models=[student,nobody]",
    "run job.yaml sweep.tasks=[{task: no_such_task}]",
    "run job.yaml distill.losses={}",
    "run job.yaml distill.losses={reverse_kl: 1.0}",
    "run job.yaml resources.capture.workers=0",
    "run job.yaml storage=s3:bucket",
    "run job.yaml name=Bad/Name",
    "run job.yaml seed=1 seed",
    "run job.yaml distill.learning_rate=0.5",
    "run job.yaml student.config.hidden_size=33 name=other",
    "run job.yaml teacher.sharding=zero3",
    "run job.yaml --each distill.steps",
    "plan job.yaml --gpu abacus",
    "quantize runs/job/student --bits 9 --out q9",
    "quantize nowhere --bits 4 --out q9",
    "export runs/job --cell nothing --format gguf --out e9",
    "generate nowhere --prompt x",
    "report nobody",
    "status nobody",
    "stop nobody",
    "cache info nowhere.yaml",
    "manifest job.yaml --image image:1 --nodes 0",
)


def merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`values` with `changes`, key by key."""
    result = dict(values)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = (
            merged(result[key], value) if both and key not in ("losses", "cache") else value
        )
    return result


def write_inputs(folder: Path) -> None:
    """Texts, chats, a random teacher with a chat template, and the specs."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
    from transformers import PreTrainedTokenizerFast as Fast

    write_texts(folder / "texts", documents=400)
    write_chats(folder / "chats", 200)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", *CONTROLS]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)], trainer)
    fast = Fast(tokenizer_object=tokenizer, eos_token=special[0], bos_token=special[0])
    fast.chat_template = CHATML
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(5)
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.25)
    # Many ends, so that answers of a random model end.
    model.generation_config = GenerationConfig(eos_token_id=list(range(0, VOCAB, 8)))
    model.save_pretrained(folder / "teacher")
    fast.save_pretrained(folder / "teacher")
    for name, changes in SPECS.items():
        text = yaml.safe_dump({"name": name, **merged(BASE_SPEC, changes)})
        (folder / f"{name}.yaml").write_text(text)


class Stillhouse:
    """The commands of one checkout, run in one folder."""

    def __init__(self, checkout: Path, folder: Path) -> None:
        self.checkout, self.folder = checkout, folder
        self.env = {
            **os.environ,
            "PYTHONPATH": str(checkout),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "COLUMNS": "100",
            "HF_HUB_OFFLINE": "1",
        }

    def start(self, module: str, *arguments: str) -> subprocess.Popen[str]:
        """A process; stdout and stderr together."""
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=self.folder,
            env=self.env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def run(self, line: str, module: str = "jobs", code: int | None = 0) -> str:
        """What a command prints, with its exit code; raises RuntimeError if that is not `code`."""
        process = self.start(module, *arguments_of(line))
        text, _ = process.communicate()
        if code is not None and process.returncode != code:
            raise RuntimeError(f"{self.checkout}: {line}: exit code {process.returncode}\n{text}")
        if "--help" not in line:
            text = without_times(text, self.folder)
        return f"{text}exit code {process.returncode}"

    def run_all(self, lines: tuple[str, ...] | list[str], title: str) -> Record:
        """Each command's text, of whatever exit code; two at a time."""
        with ThreadPoolExecutor(2) as pool:
            texts = list(pool.map(lambda line: self.run(line, code=None), lines))
        return {f"{title}: {line}": text for line, text in zip(lines, texts, strict=True)}

    def helps(self) -> Record:
        """The help of every command, found as a user finds it."""
        found: Record = {}
        todo = [""]
        while todo:
            texts = self.run_all([f"{command} --help".strip() for command in todo], "help")
            found |= texts
            commands, todo = todo, []
            for command, text in zip(commands, texts.values(), strict=True):
                listed = re.search(r"^Commands:\n((?:  .*\n)+)", text, re.MULTILINE)
                names = re.findall(r"^  (\S+)", listed[1], re.MULTILINE) if listed else []
                todo += [f"{command} {name}".strip() for name in names]
        return found


def arguments_of(line: str) -> list[str]:
    """Words of a command; blanks within [...] and {...} do not part."""
    return re.findall(r"(?:[^\s\[{]|\[[^\]]*\]|\{[^}]*\})+", line)


def without_times(text: str, folder: Path) -> str:
    """A command's text without what two runs of it differ in."""
    text = text.replace(str(folder), ".")
    text = re.sub(r"\b\d[\d,.]*(?= ?(s|ms|min|h|seconds|minutes|tokens/s|tok/s)\b)", "#", text)
    text = re.sub(r'"(started|ended)": [\d.]+', r'"\1": #', text)
    text = re.sub(r"\d{4}-\d\d-\d\dT?[ \d:.+Z]*", "#", text)
    text = re.sub(r"[0-9.]+x\b", "#", text)
    text = re.sub(r"(?m)^Cost: .*$", "Cost: #", text)
    # A baseline is timed in the dtype that is faster just then.
    text = re.sub(r"in (bfloat16|float32), the faster", "in #, the faster", text)
    return re.sub(r"[ \t]+", " ", text)


def flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Leaves of JSON by dotted key, but what is measured; numbers to the last bit."""
    if isinstance(value, dict):
        for name, each in value.items():
            if not MEASURED.search(str(name)):
                yield from flat(each, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from flat(each, f"{key}[{index}]")
    else:
        yield key, value.hex() if isinstance(value, float) else json.dumps(value)


def sha(data: bytes) -> str:
    """Sixteen digits of SHA-256."""
    return hashlib.sha256(data).hexdigest()[:16]


def tensors(path: Path) -> Iterator[tuple[str, str]]:
    """Name and hash of each tensor of a safetensors file."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    for name, facts in json.loads(data[8 : 8 + size]).items():
        if name == "__metadata__":
            yield name, json.dumps(facts, sort_keys=True)
        else:
            first, last = facts["data_offsets"]
            body = data[8 + size + first : 8 + size + last]
            yield name, f"{facts['dtype']} {facts['shape']} {sha(body)}"


def files_of(folder: Path, root: Path) -> Record:
    """What the files below a folder hold: of tensors and JSON all parts, of others a hash."""
    found: Record = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        name = str(path.relative_to(root))
        if path.suffix == ".safetensors":
            found |= {f"{name}: {part}": value for part, value in tensors(path)}
        elif path.suffix == ".json":
            content = json.loads(path.read_text())
            found |= {f"{name}: {key}": value for key, value in flat(content)}
        else:
            found[name] = sha(path.read_bytes())
    return found


def losses(run: Path) -> Record:
    """Every step's numbers, to the last bit. Of a step that was made twice, the last."""
    found: Record = {}
    for path in sorted((run / "events").glob("*.jsonl")):
        for line in path.read_text().splitlines():
            event = json.loads(line)
            if event["event"] in ("step", "evaluation"):
                where = f"{run.name}: {event['stage']} {event['event']} {event.get('step')}"
                found |= {f"{where}: {key}": value for key, value in flat(event)}
    return found


def run_record(run: Path, root: Path) -> Record:
    """What a run left that is no measurement."""
    found = losses(run)
    if (spec := run / "spec.yaml").is_file():  # torchrun leaves none
        found[f"{run.name}: spec.yaml"] = spec.read_text()
    for name in ("student", "control", "cells", "evaluations", "state"):
        found |= files_of(run / name, root)
    for others in ("/state/live/", "/state/attempts/"):
        found = {key: value for key, value in found.items() if others not in key}
    found = {key: value for key, value in found.items() if not OF_MEASURED.search(key)}
    results = run / "report" / "results.json"
    if results.is_file():
        found |= {
            f"{run.name}: report {key}": v for key, v in flat(json.loads(results.read_text()))
        }
    return found


def record(checkout: Path, folder: Path) -> Record:
    """Everything that a checkout makes of the inputs. Below `folder`, which is emptied first."""
    house = fresh(checkout, folder)
    found = house.helps() | house.run_all(("schema",), "text")
    house.run("run job.yaml")
    for name in ("drawn", "online"):
        house.run(f"{name}.yaml", module="trainer")
    house.run("run plain.yaml")
    for name in SPECS:
        found |= run_record(folder / "runs" / name, folder)
    for line in COMMANDS:
        found[f"text: {line}"] = house.run(line, code=None)
    for name in ("runs/_corpora", "runs/_logits", "runs/_responses", "quantized"):
        found |= files_of(folder / name, folder)
    for name in ("exported-gguf", "exported-hf"):
        found |= files_of(folder / name, folder)
    return found | house.run_all(ERRORS, "error")


def fresh(checkout: Path, folder: Path) -> Stillhouse:
    """A folder with the inputs alone, and the commands that will run in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_inputs(folder)
    return Stillhouse(checkout, folder)


def continued(before: Path, after: Path, folder: Path) -> Record:
    """The job begun by one checkout, stopped in its training, and continued by another."""
    house = fresh(before, folder)
    process = house.start("jobs", "run", "job.yaml", "distill.checkpoint_steps=10")
    checkpoints = folder / "runs" / "job" / "checkpoints"
    while process.poll() is None and not list(checkpoints.glob("distill-*/*-*-*.json")):
        time.sleep(0.02)
    process.terminate()  # the driver alone: its workers hear of it from the driver
    text, _ = process.communicate()
    if process.returncode != 130:
        raise RuntimeError(f"{before}: was not stopped: exit code {process.returncode}\n{text}")
    house = Stillhouse(after, folder)
    house.run("run job.yaml distill.checkpoint_steps=10")
    found = run_record(folder / "runs" / "job", folder)
    # Records of stages bear the attempt's number, and the spec the checkpoints that were asked for.
    return {
        key: value for key, value in found.items() if "/state/" not in key and "spec" not in key
    }


def differences(base: Record, now: Record) -> list[str]:
    """One line, or a few, for every key whose value is another."""
    found = []
    for key in sorted(base.keys() | now.keys()):
        if key not in now:
            found.append(f"- {key}: gone")
        elif key not in base:
            found.append(f"+ {key}: new: {now[key][:200]}")
        elif base[key] != now[key]:
            old, new = base[key].splitlines(), now[key].splitlines()
            lines = [*difflib.unified_diff(old, new, n=0, lineterm="")][2:]
            found.append("\n    ".join([f"* {key}:", *lines[:12]]))
    return found


def commit_of(name: str) -> str:
    """The full hash of a commit."""
    asked = ["git", "rev-parse", "--verify", f"{name}^{{commit}}"]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"BASE: is {name}; must be a commit of this repository")
    return done.stdout.strip()


def checkout_of(commit: str) -> Path:
    """A checkout of a commit, below the cache."""
    place = CACHE / "checkouts" / commit[:12]
    if not place.is_dir():
        place.mkdir(parents=True)
        archive = subprocess.Popen(["git", "archive", commit], cwd=ROOT, stdout=subprocess.PIPE)
        subprocess.run(["tar", "-x", "-C", str(place)], stdin=archive.stdout, check=True)
    return place


def base_record(commit: str, work: Path) -> Record:
    """A commit's record, made once on this kind of processor for these commands."""
    key = sha(Path(__file__).read_bytes())
    kept = CACHE / f"{commit[:12]}-{cpu_kind()}-{key}.json"
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(record(checkout_of(commit), work), indent=0)
        kept.write_text(text)
    return dict(json.loads(kept.read_text()))


def main(arguments: list[str]) -> int:
    """0 if both records are equal, else 1."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--base", default="main", help="the commit to compare with")
    parser.add_argument("--continue", dest="go_on", action="store_true", help="... a run as well")
    asked = parser.parse_args(arguments)
    commit = commit_of(asked.base)
    work = CACHE / "work"
    began = time.monotonic()
    base = base_record(commit, work)
    print(f"base {commit[:12]}: {len(base)} values, {time.monotonic() - began:.0f} s", flush=True)
    began = time.monotonic()
    now = record(ROOT, work)
    print(f"working tree: {len(now)} values, {time.monotonic() - began:.0f} s", flush=True)
    found = differences(base, now)
    if asked.go_on:
        other = continued(checkout_of(commit), ROOT, work)
        whole = {key: base[key] for key in other if key in base}
        print(f"continued: {len(whole)} of {len(other)} values compared", flush=True)
        found += differences(whole, other)
    for line in found[:SHOWN]:
        print(line)
    print(f"{len(found)} differences" if found else f"equal to {commit[:12]} on {cpu_kind()}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
