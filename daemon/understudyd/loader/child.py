"""The loader process: takes orders, reads files into the arena, reports.

Three kinds of threads: this process's main thread receives orders, one worker carries out loads in order
(with helpers that read), the heart beats. It computes nothing and imports no torch.
"""

import os
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue

import msgspec

from understudyd.loader import linux, wire
from understudyd.loader.faults import ENVIRONMENT_VARIABLE, CrashPoints
from understudyd.loader.heart import Heart
from understudyd.loader.pacing import Pacer
from understudyd.loader.progress import Progress
from understudyd.loader.reading import ReadCancelled, Reader, ReadError, Reading
from understudyd.loader.transport import Target, TransportError, open_target

OpenTarget = Callable[[wire.Attach, Sequence[int]], Target]

_WIND_DOWN_S = 0.5
_MAX_FDS = 4


class ProtocolError(Exception):
    """The parent said something that this loader does not understand."""


class Channel:
    """The loader's end of the socket pair. One packet is one send, so any thread may send."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def send(self, report: wire.Report) -> None:
        """Tell the parent. Without a parent there is nothing left to do."""
        try:
            self._sock.send(wire.encode(report))
        except OSError:
            os._exit(0)

    def receive(self) -> tuple[wire.Orders, list[int]] | None:
        """The next order with its file descriptors; None when the parent is gone."""
        packet, fds, flags, _ = socket.recv_fds(self._sock, wire.MAX_PACKET_BYTES, _MAX_FDS)
        if not packet:
            return None
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise ProtocolError("an order was too long")
        try:
            return wire.decode_order(packet), fds
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise ProtocolError(f"not an order: {error}") from error


class Child:
    """A loader with its arena open."""

    def __init__(
        self,
        channel: Channel,
        attach: wire.Attach,
        target: Target,
        progress: Progress,
        crash_points: CrashPoints,
    ) -> None:
        self._channel = channel
        self._target = target
        self._progress = progress
        self._crash_points = crash_points
        self._reader = Reader(
            target=target,
            arena_bytes=attach.arena_bytes,
            chunk_bytes=attach.chunk_bytes,
            threads=attach.reader_threads,
            pacer=Pacer(attach.rate_limit_bytes_per_s),
            progress=progress,
            crash_points=crash_points,
        )
        self._readings: dict[int, Reading] = {}
        self._todo: SimpleQueue[Reading | None] = SimpleQueue()

    def serve(self) -> None:
        """Carry out orders until told to stop or until the parent is gone."""
        worker = threading.Thread(target=self._work, name="worker", daemon=True)
        worker.start()
        self._channel.send(wire.Ready(pid=os.getpid()))
        while self._obey():
            pass
        for reading in list(self._readings.values()):
            reading.cancel()
        self._todo.put(None)
        worker.join(_WIND_DOWN_S)
        if not worker.is_alive():  # else a read hangs; the kernel takes everything back
            self._target.close()

    def _obey(self) -> bool:
        """One order; False when it was the last."""
        received = self._channel.receive()
        if received is None:
            return False
        match received[0]:
            case wire.Load() as load:
                reading = self._readings[load.load_id] = Reading(load, self._reader)
                self._todo.put(reading)
            case wire.Cancel(load_id=load_id):
                if (known := self._readings.get(load_id)) is not None:
                    known.cancel()
            case wire.Stop():
                return False
            case wire.Attach():
                raise ProtocolError("attached twice")
        return True

    def _work(self) -> None:
        try:
            self._crash_points.at("idle")
            while (reading := self._todo.get()) is not None:
                report = self._carry_out(reading)
                self._crash_points.at("report")
                self._channel.send(report)
                self._crash_points.at("idle")
        except BaseException as error:  # noqa: BLE001 a thread's boundary: a broken loader makes way for a new one
            self._channel.send(wire.Fatal(message=describe(error)))
            os._exit(1)

    def _carry_out(self, reading: Reading) -> wire.Report:
        load_id = reading.load.load_id
        try:
            return reading.run()
        except ReadCancelled:
            return wire.LoadStopped(load_id=load_id)
        except ReadError as error:
            return wire.LoadFault(load_id=load_id, corrupt=error.corrupt, message=str(error))
        except OSError as error:
            return wire.LoadFault(load_id=load_id, corrupt=False, message=describe(error))
        finally:
            del self._readings[load_id]


def run(sock: socket.socket, crash_points: CrashPoints, open_target: OpenTarget = open_target) -> int:
    """Be a loader on this socket; returns the exit status."""
    channel = Channel(sock)
    try:
        if (attached := channel.receive()) is None:
            return 0
        attach, fds = check_attach(attached[0]), attached[1]
        progress = Progress()
        Heart(channel.send, progress, attach.heartbeat_s).start()  # opening an arena may take long, too
        crash_points.at("open")
        target = open_target(attach, fds)
        Child(channel, attach, target, progress, crash_points).serve()
    except (ProtocolError, TransportError) as error:
        channel.send(wire.Fatal(message=describe(error)))
        return 1
    return 0


def check_attach(order: wire.Orders) -> wire.Attach:
    """The first order must be an `Attach` of this version from this process's parent."""
    match order:
        case wire.Attach(wire_version=wire.WIRE_VERSION) as attach:
            if attach.parent_pid != os.getppid():
                raise ProtocolError("the parent that spawned this loader is gone")
            return attach
        case wire.Attach(wire_version=version):
            raise ProtocolError(f"the daemon speaks version {version}, this loader {wire.WIRE_VERSION}")
        case _:
            raise ProtocolError("the first order is not `attach`")


def describe(error: BaseException) -> str:
    """An error in one line, with its type unless its message says enough."""
    return str(error) if isinstance(error, OSError | ProtocolError | TransportError) else repr(error)


def main(fd: int) -> int:
    """The process: dies with its parent, outlives signals meant for the whole group, ends in `os._exit`."""
    linux.die_with_parent()
    linux.set_process_name("ustudy-loader")
    # A terminal's Ctrl-C and a service manager's SIGTERM reach every process of the group; the parent decides
    # when loaders go, and it may still need them while it drains.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    crash_points = CrashPoints(os.environ.get(ENVIRONMENT_VARIABLE, ""))
    crash_points.at("spawn")
    return run(socket.socket(fileno=fd), crash_points)
