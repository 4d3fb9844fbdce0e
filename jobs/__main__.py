"""``python -m jobs`` is ``stillhouse``."""

from __future__ import annotations

import sys

from jobs.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
