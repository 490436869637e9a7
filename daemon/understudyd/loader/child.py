"""The loader: takes orders, reads files into the arena and the host pool, reports.

Three kinds of threads: the one that runs `run` receives orders, one worker carries out loads in order (with
helpers that read), the heart beats. It computes nothing and imports no torch.

It is a process (`main`), or, where the system lets no process share the arena, a thread of the parent. What
ends it is the same for both: its socket is closed or shut down, by the parent or by a thread of its own.
"""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue

import msgspec

from understudyd.loader import linux, proof, wire
from understudyd.loader.faults import ENVIRONMENT_VARIABLE, CrashPoints
from understudyd.loader.heart import Heart
from understudyd.loader.pacing import Pacer, Pause
from understudyd.loader.progress import Progress
from understudyd.loader.reading import ReadCancelled, Reader, ReadError, Reading
from understudyd.loader.transport import Notify, SharingRefused, Target, TransportError, open_target

OpenTarget = Callable[[wire.Attach, Sequence[int], Notify], Target]

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
            self.shut(socket.SHUT_RD)

    def shut(self, directions: int) -> None:
        """No order follows those that have arrived (SHUT_RD), and no report is sent any more (SHUT_RDWR).

        Whoever waits for that returns.
        """
        with contextlib.suppress(OSError):  # the parent was faster
            self._sock.shutdown(directions)

    @contextlib.contextmanager
    def next_order(self) -> Iterator[tuple[wire.Orders | None, Sequence[int]]]:
        """The next order, None when none will come, and its file descriptors, open within the block."""
        try:
            packet, fds, flags, _ = socket.recv_fds(
                self._sock, wire.MAX_PACKET_BYTES, _MAX_FDS, socket.MSG_CMSG_CLOEXEC
            )
        except ConnectionResetError:  # the parent left with reports unread
            packet, fds, flags = b"", [], 0
        try:
            yield _decode(packet, flags) if packet else None, fds
        finally:
            for fd in fds:
                os.close(fd)


def _decode(packet: bytes, flags: int) -> wire.Orders:
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        raise ProtocolError("an order was too long")
    try:
        return wire.decode_order(packet)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolError(f"not an order: {error}") from error


class Child:
    """A loader with its device and host pool open, and later its arena."""

    def __init__(
        self,
        channel: Channel,
        attach: wire.Attach,
        target: Target,
        progress: Progress,
        crash_points: CrashPoints,
    ) -> None:
        self._channel = channel
        self._attach = attach
        self._target = target
        self._progress = progress
        self._crash_points = crash_points
        self._pause = Pause()
        self._reader: Reader | None = None
        self._readings: dict[int, Reading] = {}
        self._todo: SimpleQueue[Reading | None] = SimpleQueue()
        self._worker = threading.Thread(target=self._work, name="worker", daemon=True)
        self._worker_error: BaseException | None = None

    def serve(self) -> None:
        """Carry out orders until told to stop or until the parent is gone. Raises what the worker met."""
        self._channel.send(wire.Attached(pid=os.getpid()))
        while self._obey():
            pass
        if self._worker_error is not None:
            raise self._worker_error

    def close(self) -> None:
        """Give up the loads in hand and let go of the target, unless a read of a process hangs.

        There the kernel takes everything back. A thread may only end when nothing of it is left.
        """
        for reading in list(self._readings.values()):
            reading.cancel()
        self._todo.put(None)
        if self._worker.ident is not None:  # it was started
            self._worker.join(None if self._attach.parent_pid == 0 else _WIND_DOWN_S)
        if not self._worker.is_alive():
            self._target.close()

    def _obey(self) -> bool:
        """One order; False when it was the last."""
        with self._channel.next_order() as (order, fds):
            match order:
                case None | wire.Stop():
                    return False
                case wire.OpenArena() if self._reader is None:
                    self._reader = self._open_arena(order, fds)
                    self._worker.start()
                    self._channel.send(wire.Ready())
                case wire.Load() if self._reader is not None:
                    reading = self._readings[order.load_id] = Reading(order, self._reader)
                    self._todo.put(reading)
                case wire.Cancel(load_id=load_id):
                    if (known := self._readings.get(load_id)) is not None:
                        known.cancel()
                case wire.Pause(is_paused=is_paused):
                    self._pause.order(is_paused)
                case wire.Attach() | wire.OpenArena() | wire.Load():
                    raise ProtocolError(f"`{type(order).__name__}` at the wrong time")
        return True

    def _open_arena(self, order: wire.OpenArena, fds: Sequence[int]) -> Reader:
        self._crash_points.at("open")
        self._target.open_arena(order, fds)
        prove(self._target, order)
        return Reader(
            target=self._target,
            arena_bytes=order.arena_bytes,
            chunk_bytes=self._attach.chunk_bytes,
            threads=self._attach.reader_threads,
            pacer=Pacer(self._attach.rate_limit_bytes_per_s),
            pause=self._pause,
            progress=self._progress,
            crash_points=self._crash_points,
        )

    def _work(self) -> None:
        try:
            self._crash_points.at("idle")
            while (reading := self._todo.get()) is not None:
                report = self._carry_out(reading)
                self._crash_points.at("report")
                self._channel.send(report)
                self._crash_points.at("idle")
        except BaseException as error:  # noqa: BLE001 a thread's boundary: `serve` raises it again
            self._worker_error = error
            self._channel.shut(socket.SHUT_RD)

    def _carry_out(self, reading: Reading) -> wire.Report:
        load_id = reading.load.load_id
        try:
            return reading.run()
        except ReadCancelled:
            return wire.LoadStopped(load_id=load_id)
        except ReadError as error:
            return wire.LoadFault(load_id=load_id, corrupt=error.corrupt, message=str(error))
        except OSError as error:
            # Without the path, which is in the order: the message may go as far as to a client.
            return wire.LoadFault(load_id=load_id, corrupt=False, message=error.strerror or str(error))
        finally:
            del self._readings[load_id]


def run(sock: socket.socket, crash_points: CrashPoints, open_target: OpenTarget = open_target) -> int:
    """Be a loader on this socket, which stays the caller's; returns the exit status.

    Raises nothing. On a thread of the parent nothing of it is left, however long that takes; a process gives
    up on a read that hangs.
    """
    channel = Channel(sock)
    progress = Progress()
    heart = Heart(channel.send, progress)
    closing = contextlib.ExitStack()

    def live() -> None:
        with channel.next_order() as (order, fds):
            if order is None or isinstance(order, wire.Stop):
                return
            attach = check_attach(order)
            heart.start(attach.heartbeat_s)  # what follows may take long, too
            target = open_target(attach, fds, lambda message: channel.send(wire.Notice(message=message)))
        child = Child(channel, attach, target, progress, crash_points)
        closing.callback(child.close)
        child.serve()

    is_well = _attempt(channel, live)
    is_well &= _attempt(channel, closing.close)
    channel.shut(socket.SHUT_RDWR)
    heart.stop()
    return 0 if is_well else 1


def _attempt(channel: Channel, step: Callable[[], None]) -> bool:
    """Whether it went well; else the parent is told that this is the end."""
    try:
        step()
    except BaseException as error:  # noqa: BLE001 the child's boundary: a broken loader makes way for a new one
        is_refused = isinstance(error, SharingRefused)
        channel.send(wire.Fatal(message=describe(error), is_refused=is_refused))
        return False
    return True


def check_attach(order: wire.Orders) -> wire.Attach:
    """The first order must be an `Attach` of this version from this process's parent, or in this process."""
    match order:
        case wire.Attach(wire_version=wire.WIRE_VERSION) as attach:
            if attach.parent_pid not in (0, os.getppid()):
                raise ProtocolError("the parent that spawned this loader is gone")
            return attach
        case wire.Attach(wire_version=version):
            raise ProtocolError(f"the daemon speaks version {version}, this loader {wire.WIRE_VERSION}")
        case _:
            raise ProtocolError("the first order is not `attach`")


def prove(target: Target, order: wire.OpenArena) -> None:
    """Find the parent's pattern in the arena and answer with this loader's. Raises `TransportError`."""
    ends_at = order.proof_offset + order.proof_bytes
    if not order.arena_bytes <= order.proof_offset <= ends_at <= order.arena_bytes + proof.PROOF_AREA_BYTES:
        raise ProtocolError("the proof does not lie in the proof area")
    if not proof.holds(target.read(order.proof_offset, order.proof_bytes), order.proof_seed):
        raise SharingRefused("the arena that this loader opened is not the parent's: its proof is not there")
    answer = proof.pattern(order.proof_seed + 1, order.proof_bytes)

    def fill(view: memoryview) -> None:
        view[:] = answer

    target.write(order.proof_offset, order.proof_bytes, fill)
    target.synchronise()


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
