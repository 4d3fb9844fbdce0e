"""What `stillhouse plan` foretells of the demo, against the demo's run.

    python -m tests.bench.plan        # after `make demo`

Prints each figure beside the run's own. Ends with 1 if the logit cache is off by more than a tenth.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from cluster.storage import open_store
from jobs.load import load_spec
from jobs.plan.forecast import forecast
from jobs.plan.place import this_machine
from jobs.report.planned import lines
from jobs.report.source import load_run
from jobs.rundir import RunDir

BOUND = 0.10


def main() -> int:
    """Exit code."""
    run = open_store("./runs/demo")
    if not run.exists("spec.yaml"):
        print("there is no run of the demo here; make demo", file=sys.stderr)
        return 2
    plan = forecast(load_spec("demo"), this_machine())
    for line in lines(replace(load_run(run), plan=plan)):
        shown = (line.show(line.planned), line.show(line.actual), line.ratio)
        print(f"{line.what:34}" + "".join(f"{text:>22}" for text in shown))
    record = RunDir(run).record("capture")
    assert record is not None
    shards = Path("runs/_logits", record.outputs["cache"], "shards")
    stored = sum(path.stat().st_size for path in shards.iterdir())
    foretold = plan["storage"]["cache"]["bytes"]
    print(f"the cache's files: {stored:,} bytes, foretold {foretold:,}")
    return int(abs(foretold / stored - 1) > BOUND)


if __name__ == "__main__":
    sys.exit(main())
