"""Where compiled ops lie: a folder for each Python environment.

torch has one for all environments of a user. What is built there names the paths of its own, so two
environments in turns would compile DeepSpeed's op each time, half a minute before training begins.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path


def ops_folder() -> Path:
    """The folder: TORCH_EXTENSIONS_DIR, which is set where it is not, so that torch has it too."""
    if not os.environ.get("TORCH_EXTENSIONS_DIR"):
        own = hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]
        folder = Path.home() / ".cache" / "torch_extensions" / f"stillhouse-{own}"
        os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    return Path(os.environ["TORCH_EXTENSIONS_DIR"])
