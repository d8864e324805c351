"""vLLM's Ray executor for the CPU platform, which names no resource of Ray's.

The workers, their queues and their RPCs are vLLM's own. Only the resource by which Ray places workers
is ours, and the cluster: local nodes, each with an object store and a scheduler of its own.
"""

from __future__ import annotations

import os
from typing import Any

import ray
from ray.cluster_utils import Cluster
from vllm.platforms import current_platform
from vllm.v1.executor import ray_executor_v2

RESOURCE = "cpu_worker"
#: The number of nodes, over which the workers are spread evenly. vLLM sends to the first node, on which
#: the engine runs, through shared memory, and to the others through sockets.
NODES = "NWAY_LORA_RAY_NODES"
type(current_platform).ray_device_key = RESOURCE


class CpuRayWorker(ray_executor_v2.RayWorkerProc):
    """A worker on a node that has no accelerator."""

    def get_node_and_physical_gpu_ids(self) -> tuple[str, list[int]]:
        return ray.get_runtime_context().get_node_id(), [0]


class CpuRayExecutor(ray_executor_v2.RayExecutorV2):
    """The executor with these workers, on a cluster of local nodes."""

    def _init_executor(self) -> None:
        ray_executor_v2.RayWorkerProc = CpuRayWorker
        nodes = int(os.environ[NODES])
        self.cluster = Cluster()
        for _ in range(nodes):
            workers = self.parallel_config.world_size // nodes
            self.cluster.add_node(resources={RESOURCE: workers}, include_dashboard=False)
        self.cluster.connect()
        super()._init_executor()
        used = {handle.node_id for handle in self.ray_worker_handles}
        assert len(used) == nodes, used

    @staticmethod
    def _get_actor_resource_kwargs() -> dict[str, Any]:
        return {"num_gpus": 0, "resources": {RESOURCE: 1}}
