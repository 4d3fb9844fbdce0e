"""A local multiple-choice task made of plain texts: which continuation is the true one?"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

YAML = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: data/{name}.jsonl
    train: data/{name}-examples.jsonl
output_type: multiple_choice
test_split: test
training_split: train
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "{{{{choices}}}}"
target_delimiter: " "
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def write_task(
    folder: Path,
    texts: Sequence[str],
    name: str = "heldout",
    choices: int = 4,
    seed: int = 0,
    examples: int = 4,
    context_words: int = 8,
    answer_words: int = 3,
) -> Path:
    """Writes a task of lm-eval: its YAML file, and the documents in a folder `data` beside it.

    Of each text that is long enough the first words are the context; the words that follow stand
    among as many from other texts, so that no choice is likelier for being short. The first
    `examples` are for prompts with examples, all others are the test.
    """
    draw = random.Random(seed)
    whole = context_words + answer_words
    words = [text.split()[:whole] for text in texts]
    cut = [
        (" ".join(line[:context_words]), " ".join(line[context_words:]))
        for line in words
        if len(line) == whole
    ]
    rows = []
    for context, answer in cut:
        others = sorted({other for _, other in cut} - {answer})
        options = [*draw.sample(others, choices - 1), answer]
        draw.shuffle(options)
        rows.append({"context": context, "choices": options, "label": options.index(answer)})
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for end, part in (("-examples", rows[:examples]), ("", rows[examples:])):
        lines = "\n".join(json.dumps(row) for row in part)
        (folder / "data" / f"{name}{end}.jsonl").write_text(lines + "\n")
    (folder / f"{name}.yaml").write_text(YAML.format(name=name))
    return folder
