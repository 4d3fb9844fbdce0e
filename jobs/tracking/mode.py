"""Which mode W&B runs in, from the spec, the WANDB_* variables, and whether there is a login."""

from __future__ import annotations

import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

MODES = ("auto", "online", "offline", "disabled")
SYNONYMS = {"dryrun": "offline", "run": "online", "shared": "online"}
HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")  # where `wandb login` logs in by default


def resolve(mode: str, environment: Mapping[str, str] = os.environ) -> str:
    """online, offline or disabled.

    Disabled, in the spec or by WANDB_MODE or WANDB_DISABLED, always holds; then WANDB_MODE; then
    `mode`; auto is online where there is a login, else offline. Raises ValueError otherwise.
    """
    if mode not in MODES:
        raise ValueError(f"tracking.mode: {mode!r} is no mode; may be {', '.join(MODES)}")
    given = environment.get("WANDB_MODE", "").strip().lower()
    given = SYNONYMS.get(given, given)
    if given and given not in MODES:
        raise ValueError(f"WANDB_MODE: {given!r} is no mode; may be {', '.join(MODES[1:])}")
    off = environment.get("WANDB_DISABLED", "").strip().lower() in ("1", "true", "yes", "on")
    if off or "disabled" in (mode, given):
        return "disabled"
    chosen = given if given not in ("", "auto") else mode
    if chosen == "auto":
        return "online" if has_login(environment) else "offline"
    return chosen


def has_login(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether wandb would find an API key, an identity token or a netrc entry; reads no key out."""
    if environment.get("WANDB_API_KEY") or environment.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    base = environment.get("WANDB_BASE_URL")
    hosts = (urlsplit(base).netloc,) if base else HOSTS
    home = Path(environment.get("HOME") or Path.home())
    named = environment.get("NETRC")
    for path in [Path(named)] if named else [home / ".netrc", home / "_netrc"]:
        try:
            entries = netrc.netrc(str(path)).hosts
        except (OSError, netrc.NetrcParseError):
            continue
        if any(host in entries for host in hosts):
            return True
    return False


def default_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Where offline runs go when nothing else is said: `$WANDB_DIR/wandb`, or `./wandb`."""
    return Path(environment.get("WANDB_DIR") or Path.cwd()).expanduser().absolute() / "wandb"
