"""A student learns from the answers of a server that fails now and then, by one command."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cluster.storage import open_store, read_events  # noqa: E402
from tests.fixtures import small_job  # noqa: E402
from tests.fixtures.corpora import WORDS, data_spec, make_corpus, save_model, write_texts  # noqa: E402
from tests.fixtures.loopback import KEY, serving  # noqa: E402

pytestmark = pytest.mark.timeout(600)

PROMPTS = 120


def test_from_prompts_through_a_server_to_a_student(tmp_path):
    store = open_store(tmp_path)
    corpus = make_corpus(store.sub("corpus"), data_spec(write_texts(tmp_path / "texts")))
    student = save_model(tmp_path / "start", corpus.tokenizer_folder())
    prompts = [f"{n} {' '.join(WORDS[n % 100 : n % 100 + 9])}" for n in range(PROMPTS)]
    rows = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    (tmp_path / "prompts.jsonl").write_text(rows)
    script = {prompts[3]: [500, "drop"], prompts[5]: ["garbage"], prompts[7]: [400]}
    with serving(script) as server:
        spec = small_job.teacher_spec(tmp_path)
        spec |= {
            "name": "asked",
            "student": {"model": str(student)},
            "tokenizer": None,
            "responses": {
                "from": {
                    "endpoint": server.url,
                    "model": "big",
                    "api_key_env": "DRILL_API_KEY",
                    "concurrency": 4,
                },
                "samples": 2,
            },
        }
        spec["data"] |= {
            "train": [{"source": str(tmp_path / "prompts.jsonl"), "format": "prompt_completion"}],
            "sequence_length": 32,
        }
        spec["distill"] |= {"mode": "responses", "steps": 10}
        path = str(small_job.write_spec(spec, tmp_path))
        code, out, err = small_job.stillhouse("run", path, cwd=tmp_path, NO_PROXY="127.0.0.1")
        assert code == 2 and "DRILL_API_KEY is not set" in out + err
        assert server.asked == []
        code, out, err = small_job.stillhouse(
            "run", path, cwd=tmp_path, NO_PROXY="127.0.0.1", DRILL_API_KEY=KEY
        )
        assert code == 0, out + err
        assert len(server.asked) == 2 * PROMPTS + 3
    (folder,) = (tmp_path / "runs" / "_responses").iterdir()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["counts"] == {
        "prompts": PROMPTS, "failed": 1, "answers": 2 * PROMPTS - 1, "cut": 0, "empty": 0,
        "left_out": 0,
    }  # fmt: skip
    assert manifest["identity"]["endpoint"] == server.url
    events = list(read_events(small_job.run_store(spec)))
    assert sum(event["event"] == "step" for event in events) == 10
    assert any(event.get("part") == "answers" for event in events)
    (made,) = [event for event in events if event["event"] == "answers"]
    assert made["counts"]["failed"] == 1
    assert (tmp_path / "runs" / "asked" / "student" / "model.safetensors").is_file()
    for file in (tmp_path / "runs").rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), file
    assert KEY not in out + err
