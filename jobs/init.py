"""A first spec for a teacher and a student: `stillhouse init` writes what `render` returns."""

from __future__ import annotations

import re

from trainer.yamlfile import as_yaml

DEFAULT_DATA = "builtin:python-docs"

_TEMPLATE = """\
# Distils {teacher} into {student}, then quantizes the student.
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
  model: {student}         # must have the teacher's vocabulary
  init: pretrained         # random: fresh weights; slice, with layers: some of the teacher's layers
  lora: null               # {{r: 16}}: train low-rank adapters only

data:
  train:                   # several sources are mixed by weight
    - source: {data}       # hub data set, glob of files, or builtin:python-docs
      format: text         # or messages, prompt_completion: what the assistant says is learnt
      # column: text       # the column that holds the documents; as it is, named like the format
      weight: 1.0
  select_sequences: 256    # held out: choices are made on these
  report_sequences: 256    # held out: results are reported on these, nothing is chosen on them
  sequence_length: 2048
  packing: documents       # no attention across documents

cache:
  method: sample           # ids drawn from each distribution: unbiased, and small
  draws: 50                # ids drawn per position; or method: topk with k: 64, the likeliest ids

distill:                   # null: quantize student.model as it is
  mode: cached             # online: the teacher runs beside the student, every step, without a
                           # cache of train; responses: learn from answers (section responses)
  losses: {{forward_kl: 1.0}}  # and reverse_kl, jsd, skew_kl, ce, hidden: see docs/training.md
  temperature: 1.0         # others need mode: online, or cache: {{method: topk, temperatures: ...}}
  steps: 2000
  tokens_per_step: 262144  # 128 sequences
  learning_rate: auto      # 2e-5 from pretrained weights, 2e-4 with lora
  zero_stage: 2            # 3 also shards the weights, for students that do not fit one GPU
  offload: none            # cpu: optimizer state in host memory
  activation_checkpointing: auto
  evaluate_steps: auto     # a tenth of the steps; the best weights on select become the student
  checkpoint_minutes: 20
  control: false           # true: train once more without the teacher, to measure its gain

sweep:                     # null: stop after training
  bits: [8, 4, 3, 2]       # of 8, 6, 5, 4, 3, 2, 1
  group_size: [64, 128]    # weights per scale, dividing all layer widths; channel: one per output
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


def render(teacher: str, student: str, data: str = DEFAULT_DATA, file: str = "SPEC") -> str:
    """A commented spec, as YAML that loads without faults.

    Args:
        teacher: hub id, local folder or URL of the teacher.
        student: the same of the student, which starts from its weights.
        data: a hub data set, a glob of local files, or builtin:python-docs.
        file: how the comments call the spec.
    """
    return _TEMPLATE.format(
        name=as_yaml(run_name(teacher, student)),
        teacher=as_yaml(teacher),
        student=as_yaml(student),
        data=as_yaml(data),
        file=file,
    )


def run_name(teacher: str, student: str) -> str:
    """A valid run name made of the last parts of two model ids, e.g. qwen3-8b-to-qwen3-0.6b."""
    return f"{_slug(teacher)}-to-{_slug(student)}"


def _slug(model: str) -> str:
    last = model.rstrip("/").rpartition("/")[2].lower()
    return re.sub(r"[^a-z0-9._-]+", "-", last).strip("-._")[:29].rstrip("-._") or "model"
