"""One evaluation shared by several processes, as ``accelerate launch`` and ``torchrun`` start them.

Every process holds the model and measures its share of the windows; what is measured is small and goes through gloo,
whatever the model runs on. Windows are measured apart from each other, so the result is that of one process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .evaluation import StreamingQuality, streaming_quality
from .storage import MakeCache


@dataclass(frozen=True)
class Share:
    """This process among those that share the work.

    rank: 0 to count - 1; the process of rank 0 reports. count: of processes. local_rank: among those of this machine.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    def of(self, items: Sequence) -> Sequence:
        """Every count-th item, from the rank-th on."""
        return items[self.rank :: self.count]

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes by rank, in every process."""
        if self.count == 1:
            return [value]
        values = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def map(self, function: Callable[[Any], Any], items: Sequence[Any], task: str) -> list[Any]:
        """What a function makes of every item, each computed by one process; the same list in every process.

        task: what the progress bar, of the process that reports, is called.
        """
        mine = tqdm(self.of(items), desc=task, unit="prompt", disable=self.rank > 0)
        parts = self.gather([function(item) for item in mine])
        return [parts[i % self.count][i // self.count] for i in range(len(items))]

    def device(self, name: str) -> str:
        """A device name for this process: "cuda" becomes the GPU of its local rank."""
        return f"{name}:{self.local_rank}" if self.count > 1 and name == "cuda" else name


@contextmanager
def shared() -> Iterator[Share]:
    """Join the processes the environment tells of (RANK, WORLD_SIZE, as launchers set them); alone without."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Share()
        return
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("gloo")
    try:
        yield Share(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        if ours:
            dist.destroy_process_group()


def quality(
    share: Share, model: PreTrainedModel, make_cache: MakeCache, windows: Sequence[torch.Tensor], chunk: int = 128
) -> StreamingQuality:
    """``streaming_quality`` over all windows, each measured by one process; the same in every process.

    Raises ConfigError as ``streaming_quality`` does.
    """
    mine = share.of(windows)
    part = None
    if mine or not windows:  # no windows at all is an error that streaming_quality tells
        part = streaming_quality(model, make_cache, mine, chunk, progress=share.rank == 0)
    parts = share.gather(part)
    window = [divmod(i, share.count) for i in range(len(windows))]  # (index in its part, rank)
    return StreamingQuality(
        **{f.name: tuple(getattr(parts[rank], f.name)[i] for i, rank in window) for f in fields(StreamingQuality)}
    )
