"""How many bytes are free for the replay."""

import psutil
import torch
from ray._common.utils import get_system_memory
from ray._private.utils import get_used_memory


def available_bytes(device: torch.device) -> int:
    """Free bytes on `device`; on a CPU within the container's limit as well as the machine's."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    in_container = get_system_memory() - get_used_memory()  # Ray reads the cgroup's figures
    return int(max(0, min(psutil.virtual_memory().available, in_container)))
