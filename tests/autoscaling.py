"""Nodes for Ray's autoscaler, as it has them of a cloud: processes of this machine (tests.rays)."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_TYPE,
    FakeMultiNodeProvider,
)
from ray.autoscaler.tags import STATUS_UP_TO_DATE, TAG_RAY_NODE_STATUS

from tests.rays import PORTS, RAY, start_node


def configuration(gcs: str, folder: Path, most: int) -> dict[str, Any]:
    """Of `ray start --autoscaling-config`: nodes of one CPU, at most so many beside the head."""
    return {
        "cluster_name": "growing",
        "max_workers": most,
        "idle_timeout_minutes": 0.2,
        "upscaling_speed": 1.0,
        "provider": {
            "type": "external",
            "module": "tests.autoscaling.Provider",
            "gcs_address": gcs,
            "folder": str(folder),
            "use_node_id_as_ip": True,  # all have one address
            "disable_node_updaters": True,  # nothing is to be done on a new node
        },
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "available_node_types": {
            FAKE_HEAD_NODE_TYPE: {"node_config": {}, "resources": {"CPU": 1}, "max_workers": 0},
            "small": {"node_config": {}, "resources": {"CPU": 1}, "max_workers": most},
        },
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        **{name: [] for name in ("cluster_synced_files", "file_mounts_sync_continuously")},
        **{f"{when}_commands": [] for when in ("initialization", "setup")},
        **{f"{kind}_setup_commands": [] for kind in ("head", "worker")},
        **{f"{kind}_start_ray_commands": [] for kind in ("head", "worker")},
    }


class Provider(FakeMultiNodeProvider):
    """Ray's own for tests, whose nodes share one folder and unpack the checkout over each other's;
    these have one each."""

    def _create_node_with_resources_and_labels(
        self,
        node_config: Any,
        tags: Mapping[str, str],
        count: int,
        resources: Mapping[str, float],
        labels: Any,
    ) -> None:
        with self.lock:
            name = self._next_hex_node_id()
            command = [RAY, "start", "--address", self._gcs_address, "--block", *PORTS]
            command += ["--num-cpus", str(int(resources["CPU"]))]
            env = {**os.environ, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": name}
            log = Path(self.provider_config["folder"]) / f"grown-{name[-5:]}.log"
            node = start_node(command, env, log)
            while "will now block" not in log.read_text():  # one that is not there yet is given up
                time.sleep(0.1)
            tags = {**tags, TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE}
            self._nodes[name] = {"tags": tags, "node": node}

    def _terminate_node(self, node: Mapping[str, Any]) -> None:
        node["node"].kill()
        shutil.rmtree(node["node"].temp, ignore_errors=True)
