"""Processes that begin with everything imported: one process imports once, and forks a child for each arm.

Half of what a short measurement takes is imports. The nursery does them once and forks; a child is a process of its
own from there on, in which nothing has been computed. It is handed its pipes over a socket. Where a fork is not to be
trusted (other systems than Linux, or a thread that an import has started) the child begins anew, as a fresh
interpreter.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any

from veneer.comparing.measures import _machine

PRELOADED = ("torch", "transformers.modeling_utils", "transformers.modeling_layers", "accelerate", "veneer.methods",
             "veneer.training", "torch.utils.flop_counter")  # fmt: skip
MESSAGE = 65_536


class Nursery:
    """Starts children: `python -m MODULE PATH` in effect. A context; leaving it ends the nursery, not its children."""

    def __init__(
        self, module: str, environment: Mapping[str, str], preloaded: Sequence[str] = PRELOADED
    ) -> None:
        self.module = module
        self._here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "veneer.comparing.measures.nursery", str(there.fileno()), module, *preloaded],
            pass_fds=[there.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=dict(environment),
        )  # fmt: skip
        there.close()

    def start(self, path: str, errors: IO[str]) -> Born | None:
        """A child that reads `path`, its standard error to `errors`; None where the nursery itself has ended."""
        child_in, to_child = os.pipe()
        from_child, child_out = os.pipe()
        try:
            socket.send_fds(self._here, [path.encode()], [child_in, child_out, errors.fileno()])
            pid = int(self._here.recv(MESSAGE) or b"0")
        except OSError:
            pid = 0
        finally:
            os.close(child_in)
            os.close(child_out)
        born = Born(pid, self, os.fdopen(to_child, "w"), os.fdopen(from_child))
        if pid:
            return born
        born.stdin.close()
        born.stdout.close()
        return None

    def exit_code(self, pid: int) -> int | None:
        """Of a child that has ended, negative for a signal; None while it runs."""
        try:
            self._here.send(json.dumps({"wait": pid}).encode())
            return json.loads(self._here.recv(MESSAGE) or b"1")
        except OSError:  # the nursery is gone
            return 1

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *error: Any) -> None:
        self._here.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Born:
    """A forked child, with as much of `subprocess.Popen` as is used: stdin, stdout, poll, wait, kill."""

    def __init__(self, pid: int, nursery: Nursery, stdin: IO[str], stdout: IO[str]) -> None:
        self.pid, self.stdin, self.stdout = pid, stdin, stdout
        self._nursery = nursery
        self._code: int | None = None

    def poll(self) -> int | None:
        if self._code is None:
            self._code = self._nursery.exit_code(self.pid)
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        until = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if until is not None and time.monotonic() > until:
                raise subprocess.TimeoutExpired("child", timeout or 0.0)
            time.sleep(0.02)
        return self._code or 0

    def kill(self) -> None:
        if self.poll() is None:  # else the number may be another process's by now
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


# -- in the nursery ----------------------------------------------------------------------------------


def serve(channel: socket.socket, module: str, preloaded: Sequence[str]) -> None:
    """Fork for each message that brings pipes, answer for each that asks; end when the other side is closed."""
    for name in preloaded:
        with contextlib.suppress(ImportError):  # what is not installed is not needed by every base
            importlib.import_module(name)
    is_safe = sys.platform.startswith("linux") and len(os.listdir("/proc/self/task")) == 1
    while True:
        message, handed, *_ = socket.recv_fds(channel, MESSAGE, 3)
        if not message and not handed:
            return
        if handed:
            channel.send(str(_born(message.decode(), handed, module, is_safe)).encode())
        else:
            channel.send(json.dumps(_ended(json.loads(message)["wait"])).encode())


def _born(path: str, handed: Sequence[int], module: str, is_safe: bool) -> int:
    held = _machine.resident_bytes()
    pid = os.fork()
    if pid:
        for descriptor in handed:
            os.close(descriptor)
        return pid
    code = 1
    try:
        for place, descriptor in enumerate(handed):
            os.dup2(descriptor, place)
        os.closerange(3, max(64, *handed) + 1)  # the nursery's socket, and pipes of others
        if not is_safe:
            os.execv(sys.executable, [sys.executable, "-m", module, path])
        # Pages of libraries that were read before the fork are not counted here until they are touched again.
        _machine.SHARED = max(0, held - _machine.resident_bytes())
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
        code = importlib.import_module(module).main(path)
        sys.stderr.flush()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    os._exit(code)  # nothing of the nursery's own is cleaned up twice


def _ended(pid: int) -> int | None:
    try:
        found, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return 1
    return os.waitstatus_to_exitcode(status) if found else None


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that began this one
    serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2], sys.argv[3:])
