"""Processes of one launch notice when one of them is gone, whatever they do: load, train, wait for each other."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

from mmkd.base.distributed import end_process, rank, world_size
from mmkd.errors import DataError, one_line

_ARRIVAL = timedelta(minutes=10)  # a host may pull a container first
_GREETING = 60.0  # seconds, once all processes are there
_GRACE = 20.0  # seconds in which a process may end by itself and say why: by the same mistake, or a message that did not arrive
_DONE = b"0"

logger = logging.getLogger(__name__)


@contextmanager
def watching_peers(grace: float = _GRACE) -> Iterator[None]:
    """While the processes of a launch work together. When one of them leaves this by an error or its death, the others end
    within `grace` seconds, with the reason.

    A collective call tells this only to those who wait in it, NCCL's after many minutes. Raises DataError if some
    processes do not come. Does nothing for a single process.
    """
    if world_size() == 1 or not {"MASTER_ADDR", "MASTER_PORT", "RANK"} <= os.environ.keys():
        yield
        return
    peers = _met(grace)
    yield
    if peers is not None:
        peers.done()


def _met(grace: float) -> _Peers | None:
    import torch.distributed as dist

    try:
        store = dist.PrefixStore("mmkd/peers", next(dist.rendezvous("env://", timeout=_ARRIVAL))[0])
        return _Peers(store, grace)
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise DataError(
            f"process {rank()} of {world_size()} did not meet the others at {place} (MASTER_ADDR, MASTER_PORT) within "
            f"{_ARRIVAL.seconds // 60} minutes: {one_line(error, 160)}; look at the output of the others, and at the address"
        ) from None
    except OSError as error:
        logger.warning("this process does not notice at once when another one of the run ends: %s", one_line(error))
        return None


class _Peers:
    """One end of the connections: the first process holds one to each other process, each of those one to the first."""

    def __init__(self, store, grace: float):
        self._grace, self._over = grace, False
        self._links: dict[int, socket.socket] = {}
        try:
            self._greet(store) if rank() == 0 else self._call(store)
        except OSError:
            for link in self._links.values():
                link.close()
            raise
        for who, link in self._links.items():
            threading.Thread(target=self._follow, args=(who, link), daemon=True, name=f"peer {who}").start()

    def done(self) -> None:
        """Says that this process's work is done."""
        self._over = True
        for link in self._links.values():
            with suppress(OSError):
                link.sendall(_DONE)
                link.shutdown(socket.SHUT_WR)

    def _greet(self, store) -> None:
        """Waits for a connection of each other process. A word that only they can read keeps strangers out."""
        word = secrets.token_hex(16)
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        with socket.create_server(("", 0), family=family, dualstack_ipv6=both, backlog=world_size()) as door:
            store.set("door", f"{door.getsockname()[1]} {word}")
            end = time.monotonic() + _GREETING
            while len(self._links) < world_size() - 1:
                door.settimeout(max(0.01, end - time.monotonic()))
                link, _ = door.accept()
                link.settimeout(5.0)
                with suppress(OSError, ValueError):
                    said, number = link.recv(64, socket.MSG_WAITALL).decode().split()
                    if secrets.compare_digest(said, word) and 0 < int(number) < world_size():
                        self._links[int(number)] = _kept_open(link)
                        continue
                link.close()

    def _call(self, store) -> None:
        port, word = store.get("door").decode().split()
        link = socket.create_connection((os.environ["MASTER_ADDR"], int(port)), timeout=_GREETING)
        self._links[0] = _kept_open(link)
        link.sendall(f"{word} {rank()}".ljust(64).encode())

    def _follow(self, who: int, link: socket.socket) -> None:
        """Reads what `who` says until it is gone. The first process passes on who that was, one word a process."""
        said = b""
        with suppress(OSError):
            while part := link.recv(64):
                said += part
                if rank() and b"\n" in said:
                    break
        if said == _DONE:
            return
        lost = int(said) if rank() and said.endswith(b"\n") else who
        for other, link in self._links.items() if rank() == 0 else ():
            with suppress(OSError):
                if other != who:
                    link.sendall(f"{lost}\n".encode())
        time.sleep(self._grace)
        if self._over:
            return
        print(
            f"mmkd: process {rank()} of {world_size()} ends, since process {lost} of this run did; its own output says why. "
            "The same command goes on from what is on the disk",
            file=sys.stderr,
        )
        end_process(1)


def _kept_open(link: socket.socket) -> socket.socket:
    """A connection that lasts as long as both processes, and notices a host that is gone within 40 seconds."""
    link.settimeout(None)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 5)):
        if hasattr(socket, name):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return link
