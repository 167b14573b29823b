"""How many bytes are free for the replay."""

import psutil
import torch
from ray._common.utils import get_system_memory


def available_bytes(device: torch.device) -> int:
    """Free bytes on `device`; on a CPU within the container's limit as well as the machine's."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    memory = psutil.virtual_memory()
    used = memory.total - memory.available
    return int(max(0, min(memory.available, get_system_memory() - used)))
