"""Ray's own autoscaler on one machine: nodes are processes, started for waiting work and stopped when idle."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import yaml
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

PORT = 6379  # the provider assumes it
RAY = Path(sys.executable).with_name("ray")


@contextmanager
def autoscaling_cluster(max_nodes: int, idle_minutes: float = 0.15) -> Iterator[str]:
    """The address of a cluster whose head has no CPU, and that grows to `max_nodes` nodes of one CPU and back."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        config = Path(folder) / "autoscaler.yaml"
        config.write_text(yaml.safe_dump(_config(max_nodes, idle_minutes)))
        environment = {
            **os.environ,
            "RAY_FAKE_CLUSTER": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
            "RAY_AUTH_MODE": "disabled",
        }
        start = [RAY, "start", "--head", "--port", PORT, "--num-cpus", 0, "--temp-dir", folder]
        start += ["--include-dashboard", "false", "--disable-usage-stats", "--autoscaling-config", config]
        done = subprocess.run([str(word) for word in start], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        try:
            yield f"127.0.0.1:{PORT}"
        finally:
            _end(folder)


def _config(max_nodes: int, idle_minutes: float) -> dict:
    provider = {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "head_node_id": FAKE_HEAD_NODE_ID,
        **dict.fromkeys(("launch_multiple", "use_node_id_as_ip", "disable_node_updaters"), True),
    }
    node_types = {
        "ray.head.default": {"resources": {"CPU": 0}, "max_workers": 0, "node_config": {}},
        "worker": {"resources": {"CPU": 1}, "min_workers": 0, "max_workers": max_nodes, "node_config": {}},
    }
    lists = (
        "cluster_synced_files",
        "rsync_exclude",
        "rsync_filter",
        "initialization_commands",
        "setup_commands",
        "head_setup_commands",
        "worker_setup_commands",
    )
    return {
        "cluster_name": "wml-ray-test",
        "max_workers": max_nodes,
        "idle_timeout_minutes": idle_minutes,
        "provider": provider,
        "available_node_types": node_types,
        "head_node_type": "ray.head.default",
        **{name: [] for name in (*lists, "head_start_ray_commands", "worker_start_ray_commands")},
        "auth": {"ssh_user": "nobody"},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
    }


def _end(folder: str) -> None:
    """Kill every process of this cluster: the folder is in the command line of each."""
    processes = [
        process for process in psutil.process_iter(["cmdline"]) if folder in " ".join(process.info["cmdline"] or [])
    ]
    for process in processes:
        process.kill()
    psutil.wait_procs(processes, timeout=30)
