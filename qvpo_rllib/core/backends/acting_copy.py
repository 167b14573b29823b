"""Networks on the CPU to act with, beside those that learn on a GPU."""

import torch
from torch import nn


class ActingCopy:
    """Keeps networks on the CPU as the learning ones are, by one transfer after an update.

    A choice of actions is hundreds of small operations: on a GPU their starts alone take
    milliseconds, and a captured graph would serve one number of environments.

    Args:
        source: the networks that learn, on a GPU.
        copy: of the same shapes, on the CPU. Its parameters move into memory of this object.
        prefixes: of the names of parameters and saved buffers; the others are never read.
    """

    def __init__(self, source: nn.Module, copy: nn.Module, prefixes: tuple[str, ...]) -> None:
        self._source, self._parameters = (
            [p for name, p in tensors.items() if name.startswith(prefixes)]
            for tensors in (source.state_dict(keep_vars=True), copy.state_dict(keep_vars=True))
        )
        sizes = [p.numel() for p in self._source]
        self._memory = torch.empty(sum(sizes), pin_memory=self._source[0].is_cuda)
        for parameter, part in zip(self._parameters, torch.split(self._memory, sizes), strict=True):
            parameter.data = part.view(parameter.shape)
        self._seen: tuple[int, int] | None = None

    @torch.no_grad()
    def refresh(self, num_updates: int) -> None:
        """Copies the parameters if they have changed; waits for the device then.

        Args:
            num_updates: done so far: an update changes no tensor's version.
        """
        now = num_updates, sum(p._version for p in self._source)
        if now != self._seen:
            self._memory.copy_(torch.cat([p.flatten() for p in self._source]))
            torch.autograd.graph.increment_version(self._parameters)
            self._seen = now
