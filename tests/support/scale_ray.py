"""vLLM's Ray executor for the CPU platform, which names no resource of Ray's.

The workers, their queues and their RPCs are vLLM's own. Only the resource by which Ray places workers
is ours.
"""

from __future__ import annotations

from typing import Any

import ray
from vllm.platforms import current_platform
from vllm.v1.executor import ray_executor_v2

RESOURCE = "cpu_worker"
type(current_platform).ray_device_key = RESOURCE


class CpuRayWorker(ray_executor_v2.RayWorkerProc):
    """A worker on a node that has no accelerator."""

    def get_node_and_physical_gpu_ids(self) -> tuple[str, list[int]]:
        return ray.get_runtime_context().get_node_id(), [0]


class CpuRayExecutor(ray_executor_v2.RayExecutorV2):
    """The executor with these workers, on a cluster of one local node."""

    def _init_executor(self) -> None:
        ray_executor_v2.RayWorkerProc = CpuRayWorker
        if not ray.is_initialized():
            ray.init(resources={RESOURCE: self.parallel_config.world_size}, include_dashboard=False)
        super()._init_executor()

    @staticmethod
    def _get_actor_resource_kwargs() -> dict[str, Any]:
        return {"num_gpus": 0, "resources": {RESOURCE: 1}}
