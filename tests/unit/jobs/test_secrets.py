"""No line about a server's endpoint or key repeats what may be a secret."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.errors import SpecErrors
from jobs.spec.load import load_spec
from trainer.__main__ import load

SPEC = """
name: a-run
student: {init: random, config: {model_type: llama, hidden_size: 64}}
tokenizer: {train: 1024}
data: {train: [{source: a.jsonl, format: messages}]}
distill: {mode: responses, losses: {ce: 1.0}}
responses: {from: {endpoint: https://x.example/v1, model: m}}
"""


@pytest.mark.parametrize("read", [load_spec, load])
@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("api_key_env", "sk-SECRET-1", "may be the name of an environment variable, e.g. API_KEY"),
        ("endpoint", "x.example/v1?key=SECRET", "may be an http(s) URL with a host"),
        ("endpoint", "https:///v1?key=SECRET", "may be an http(s) URL with a host"),
        ("endpoint", "https://[SECRET/v1", "may be an http(s) URL with a host"),
        ("endpoint", "https://me:SECRET@x.example/v1", "has credentials in the URL; remove them"),
        ("endpoint", "https://x.example/v1?key=SECRET", "may be a base URL such as"),
        ("endpoint", "https://x.example/v1#SECRET", "may be a base URL such as"),
    ],
)
def test_what_may_be_a_secret_is_not_repeated(read, key, value, why, tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(SPEC)
    with pytest.raises((SpecErrors, ValueError)) as caught:
        read(str(path), [f"responses.from.{key}={value}"])
    assert "SECRET" not in str(caught.value)
    lines = [line for line in str(caught.value).splitlines() if "responses.from" in line]
    assert len(lines) == 1 and lines[0].startswith(f"responses.from.{key}: {why}")
