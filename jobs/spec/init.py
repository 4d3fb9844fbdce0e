"""A first spec for a teacher and a student: `stillhouse init` writes what `render` returns."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.spec.yaml import as_yaml

DEFAULT_DATA = "builtin:python-docs"
SLICE = "slice"  # in place of a student: layers of the teacher

_TEMPLATE = """\
# Distils {title}, then quantizes the student.
#   check and run it here:  stillhouse run {file}
#   change a value once:    stillhouse run {file} distill.steps=50
#   every key there is:     stillhouse schema
# Relative paths are relative to the directory in which the command is run.

name: {name}
seed: 17
storage: ./runs            # a folder or URL (s3://bucket/prefix) that all machines see

teacher:                   # null: plain training, with losses: {{ce: 1.0}}
  model: {teacher}         # hub id, folder or URL
  dtype: auto              # bfloat16 where the hardware is fast at it, else float32
  sharding: auto           # zero3 shards the teacher over the workers where it does not fit one

student:
{student}
  lora: null               # {{r: 16}}: train low-rank adapters only

data:
  train:                   # several sources are mixed by weight
    - source: {data}       # hub data set, glob of files, or builtin:python-docs
      format: text         # or messages, prompt_completion: what the assistant says is learnt
      # column: text       # the column that holds the documents; as it is, named like the format
      weight: 1.0
  select_sequences: {select}    # held out: choices are made on these
  report_sequences: {report}    # held out: results are reported on these, nothing is chosen on them
  sequence_length: {length}
  packing: documents       # no attention across documents

cache:
  method: sample           # ids drawn from each distribution: unbiased, and small
  draws: 50                # ids drawn per position; or method: topk with k: 64, the likeliest ids

distill:                   # null: quantize student.model as it is
  mode: cached             # online: the teacher runs beside the student, every step, without a
                           # cache of train; responses: learn from answers (section responses)
  losses: {{forward_kl: 1.0}}  # and reverse_kl, jsd, skew_kl, ce, hidden: see docs/training.md
  temperature: 1.0         # others need mode: online, or cache: {{method: topk, temperatures: ...}}
  steps: {steps}
  tokens_per_step: {step}  # {sequences} sequences
  learning_rate: auto      # 2e-5 from pretrained weights, 2e-4 with lora
  zero_stage: 2            # 3 also shards the weights, for students that do not fit one GPU
  offload: none            # cpu: optimizer state in host memory
  activation_checkpointing: auto
  evaluate_steps: auto     # a tenth of the steps; the best weights on select become the student
  checkpoint_minutes: 20
  control: false           # true: train once more without the teacher, to measure its gain

sweep:                     # null: stop after training
  bits: [8, 4, 3, 2]       # of 8, 6, 5, 4, 3, 2, 1
  group_size: auto         # weights per scale: two sizes that divide all layer widths, e.g.
                           # [64, 128]; channel: one per output
  methods: [hqq]           # and rtn: plain rounding, the baseline; int8-dynamic: weights and
                           # activations in int8, one more cell
  embeddings: false        # true: quantize the input embeddings too, if tied together with head
  head: false              # true: quantize the output head too
  models: [student]        # [teacher, student]: both quantized, and told which pays
  budgets_mb: []           # for each size in 10^6 bytes a cell with bits chosen layer by layer
  recover: null            # e.g. {{steps: 200}}: scales of 3- and 2-bit cells trained for a moment
  tasks: []                # benchmarks of lm-eval, e.g. [arc_easy]

resources:
  max_failures: 3          # lost workers and tasks that are replaced before the run fails

tracking:
  mode: auto               # Weights & Biases: auto, online, offline or disabled
  project: stillhouse
"""


@dataclass(frozen=True)
class Sizes:
    """Numbers of a spec that depend on the models and the data.

    length: tokens of a sequence. select, report: held-out sequences. steps, step_tokens: of the
    training. layers: of a student cut from its teacher, None of another one.
    """

    length: int = 2048
    select: int = 256
    report: int = 256
    steps: int = 2000
    step_tokens: int = 262144
    layers: int | None = None


def read_sizes(teacher: str, student: str, data: str = DEFAULT_DATA) -> Sizes:
    """Sizes that fit the models, as far as their configs are here, and the data.

    Only for a student cut from its teacher is a config also fetched: it gets half of the layers.
    Raises ValueError, one line, where that cannot be read.
    """
    sliced = student == SLICE
    models = [teacher] if sliced else [teacher, student]
    length = min([2048, *(most for model in models if (most := _positions(_local(model))))])
    layers = _half_of_the_layers(teacher) if sliced else None
    if data == DEFAULT_DATA:  # two megabytes of prose: enough for a trial
        return Sizes(min(length, 512), 64, 128, 200, 16384, layers)
    return Sizes(length, layers=layers)


def render(
    teacher: str,
    student: str,
    data: str = DEFAULT_DATA,
    file: str = "SPEC",
    sizes: Sizes | None = None,
) -> str:
    """A commented spec, as YAML that loads without faults.

    Args:
        teacher: hub id, local folder or URL of the teacher.
        student: the same of the student, which starts from its weights; or slice, for layers of
            the teacher.
        data: a hub data set, a glob of local files, or builtin:python-docs.
        file: how the comments call the spec.
        sizes: None for those of `read_sizes`.

    Raises ValueError as `read_sizes`.
    """
    sizes = sizes or read_sizes(teacher, student, data)
    sequences = max(1, sizes.step_tokens // sizes.length)
    if sizes.layers is None:
        title = f"{as_yaml(teacher)} into {as_yaml(student)}"
        lines = [
            f"  model: {as_yaml(student)}         # must have the teacher's vocabulary",
            "  init: pretrained         # random: fresh weights; slice, with layers in place of "
            "model: layers",
            "                           # of the teacher",
        ]
    else:
        title = f"{as_yaml(teacher)} into {sizes.layers} of its layers"
        lines = [
            "  init: slice              # layers of the teacher, evenly kept; pretrained: with a "
            "model",
            f"  layers: {sizes.layers:<3}              # half of the teacher's",
        ]
    return _TEMPLATE.format(
        name=as_yaml(run_name(teacher, student)),
        title=title,
        teacher=as_yaml(teacher),
        student="\n".join(lines),
        data=as_yaml(data),
        file=file,
        length=sizes.length,
        select=f"{sizes.select:<3}",
        report=f"{sizes.report:<3}",
        step=f"{sequences * sizes.length:<6}",
        steps=sizes.steps,
        sequences=sequences,
    )


def _half_of_the_layers(teacher: str) -> int:
    """Raises ValueError, one line, if the teacher's config cannot be read."""
    from trainer.models.load import find_model

    config = _read(find_model("--teacher", teacher, weights=False))
    layers = _number(config, ("num_hidden_layers", "n_layer"))
    if layers is None:
        raise ValueError(
            f"--teacher: the config.json of {teacher} names no num_hidden_layers, so it cannot be "
            "said how many of them a slice keeps; give a --student"
        )
    return max(1, layers // 2)


def _local(model: str) -> dict[str, Any]:
    """The config of a model in a local folder; empty for another one."""
    try:
        return _read(Path(model).expanduser())
    except (ValueError, OSError, RuntimeError):  # no such folder, or a name that is none
        return {}


def _read(folder: Path) -> dict[str, Any]:
    """The text part of a folder's config.json. Raises ValueError, one line, and OSError."""
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder}/config.json cannot be read as JSON ({error})") from None
    text = raw.get("text_config", raw) if isinstance(raw, dict) else {}
    return text if isinstance(text, dict) else {}


def _positions(config: dict[str, Any]) -> int | None:
    return _number(config, ("max_position_embeddings", "n_positions"))


def _number(config: dict[str, Any], keys: Iterable[str]) -> int | None:
    found = (config.get(key) for key in keys)
    return next((value for value in found if type(value) is int and value > 0), None)


def run_name(teacher: str, student: str) -> str:
    """A valid run name made of the last parts of two model ids, e.g. qwen3-8b-to-qwen3-0.6b."""
    return f"{_slug(teacher)}-to-{_slug(student)}"


def _slug(model: str) -> str:
    last = model.rstrip("/").rpartition("/")[2].lower()
    return re.sub(r"[^a-z0-9._-]+", "-", last).strip("-._")[:29].rstrip("-._") or "model"
