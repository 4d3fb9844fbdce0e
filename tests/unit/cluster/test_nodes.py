"""Why packages were not installed, of what Ray 2.60 says."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import ray
from ray.runtime_env import RuntimeEnv, RuntimeEnvConfig

from cluster.nodes import install_seconds, not_installed

RAY = """runtime_env setup failed: Failed to set up runtime environment.
Could not create the actor because its associated runtime env failed to be created.
[Node 192.0.2.2] Traceback (most recent call last):
  File "ray/_private/runtime_env/agent/runtime_env_agent.py", line 561, in _create_runtime_env
    runtime_env_context = await asyncio.wait_for(
                          ^^^^^^^^^^^^^^^^^^^^^^^
"""
PIP = """ray._private.runtime_env.utils.SubprocessCalledProcessError: Run cmd[9] failed.
Command '['/tmp/ray/session/runtime_resources/pip/7c4b/virtualenv/bin/python', '-m', 'pip']'
Last 50 lines of stdout:
    Looking in indexes: https://pypi.org/simple
    ERROR: Could not find a version that satisfies the requirement hqq==9.0 (from versions: 0.1.1)
    ERROR: No matching distribution found for hqq==9.0
    [notice] A new release of pip is available

"""
LATE = "Failed to install runtime_env within the timeout of 77 seconds. Consider increasing it.\n"
ENDS = " (all that was said is in runtime_env_setup-*.log among Ray's logs there)"


@pytest.mark.parametrize(
    ("text", "why"),
    [(PIP, "No matching distribution found for hqq==9.0"), (LATE, LATE.strip())],
)
def test_the_line_that_says_why_is_found(text: str, why: str) -> None:
    found = not_installed(RAY + text)
    assert found == f"packages could not be installed on node 192.0.2.2: {why}{ENDS}"


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        (RuntimeEnv(env_vars={"A": "1"}), 0),
        (RuntimeEnv(pip=["hqq"]), 600),
        (RuntimeEnv(uv=["hqq"], config=RuntimeEnvConfig(setup_timeout_seconds=77)), 77),
        (RuntimeEnv(pip=["hqq"], config=RuntimeEnvConfig(setup_timeout_seconds=-1)), math.inf),
    ],
)
def test_how_long_packages_may_take(
    environment: RuntimeEnv, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = SimpleNamespace(runtime_env=environment)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    assert install_seconds() == seconds


def test_other_words_stay_as_they_are() -> None:
    assert not_installed("Job entrypoint command failed with exit code 1") is None
