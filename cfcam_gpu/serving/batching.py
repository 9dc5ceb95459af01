"""Dynamic batches: what waits for the network goes through it together, in one thread."""

import asyncio
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple


class _Waiting(NamedTuple):
    key: Hashable
    item: Any
    since: float
    result: asyncio.Future


class Batcher:
    """Calls ``run`` with several items at a time, in a thread of its own.

    A batch begins with the item that has waited longest. It is run when it has ``size`` items of that one's key, or
    when that one has waited ``wait_s``; while another batch runs, items gather without a further wait. An item whose
    submitter has been cancelled by then is left out.

    Args:
        run: called with a list of items of one key; returns a result or an exception for each.
        size: items of a batch, at most.
        wait_s: seconds.
        left_out: called for each item that nobody waits for any more.

    >>> async with Batcher(run, size=32, wait_s=0.01) as batcher:
    ...     result = await batcher.submit(key, item)
    """

    def __init__(
        self,
        run: Callable[[list[Any]], Sequence[Any]],
        size: int,
        wait_s: float,
        left_out: Callable[[], None] = lambda: None,
    ) -> None:
        self._run, self._size, self._wait_s, self._left_out = run, size, wait_s, left_out
        self._waiting: list[_Waiting] = []
        self._thread = ThreadPoolExecutor(1, "cfcam-network")

    async def __aenter__(self) -> "Batcher":
        self._arrived = asyncio.Event()
        self._task = asyncio.create_task(self._serve())
        return self

    async def __aexit__(self, *_: Any) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        for waiting in self._waiting:
            waiting.result.cancel()
        self._thread.shutdown()

    def __len__(self) -> int:
        """Items that wait."""
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        return not self._task.done()

    async def submit(self, key: Hashable, item: Any) -> Any:
        """The result of ``item``, which shares its batch with others of equal keys; or raises its exception."""
        loop = asyncio.get_running_loop()
        waiting = _Waiting(key, item, loop.time(), loop.create_future())
        self._waiting.append(waiting)
        self._arrived.set()
        return await waiting.result

    async def _serve(self):
        loop = asyncio.get_running_loop()
        while True:
            batch = self._take(await self._key_of_next(loop))
            if not batch:
                continue
            try:
                results = await loop.run_in_executor(self._thread, self._run, [waiting.item for waiting in batch])
            except asyncio.CancelledError:
                for waiting in batch:
                    waiting.result.cancel()
                raise
            except Exception as error:
                results = [error] * len(batch)
            for waiting, result in zip(batch, results):
                if waiting.result.done():
                    continue  # its submitter has left meanwhile
                if isinstance(result, Exception):
                    waiting.result.set_exception(result)
                else:
                    waiting.result.set_result(result)
            batch = results = None  # or the last batch stays in memory until there is another

    async def _key_of_next(self, loop):
        """The key of the next batch, once it is full or due."""
        while True:
            self._drop()
            if self._waiting:
                first = self._waiting[0]
                left_s = first.since + self._wait_s - loop.time()
                if left_s <= 0 or sum(each.key == first.key for each in self._waiting) >= self._size:
                    return first.key
            else:
                left_s = None
            self._arrived.clear()
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), left_s)

    def _drop(self):
        """Leave out what nobody waits for."""
        n_before = len(self._waiting)
        self._waiting = [waiting for waiting in self._waiting if not waiting.result.done()]
        for _ in range(n_before - len(self._waiting)):
            self._left_out()

    def _take(self, key):
        batch = [waiting for waiting in self._waiting if waiting.key == key][: self._size]
        taken = set(map(id, batch))
        self._waiting = [waiting for waiting in self._waiting if id(waiting) not in taken]
        return batch
