"""Starts the installed command as a person would, shows what it prints, and ends what it started. Knows no model."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from rich.console import Console

LORACTL = str(Path(sys.executable).with_name("loractl"))
_START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 30.0


class DemoFailure(Exception):
    """A step of the demo did not do what it should; the message says which."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run_loractl(*args: str, console: Console, environment: Mapping[str, str], show: bool = True) -> str:
    """Run one command to its end, its progress passed through to the terminal; return what it wrote on stdout."""
    console.print(f"[dim]$ loractl {' '.join(args)}[/dim]", highlight=False, soft_wrap=True)
    done = subprocess.run(
        [LORACTL, *args],
        env=dict(os.environ) | dict(environment),
        stdout=subprocess.PIPE,
        stderr=None if show else subprocess.DEVNULL,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise DemoFailure(f"`loractl {args[0]}` ended with exit code {done.returncode}")
    return done.stdout


@dataclass(slots=True)
class Service:
    """A long-running `loractl` process, its log file, and its address."""

    name: str
    url: str
    log: Path
    process: subprocess.Popen[bytes]
    stopped: bool = field(default=False)

    def wait_until_ready(self) -> None:
        """Ask `/readyz` until it says yes; raises DemoFailure with the log's end when the process ends or hangs."""
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/readyz", timeout=2.0).is_success:
                    return
            time.sleep(0.2)
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
        raise DemoFailure(f"the {self.name} did not become ready; its log ends:\n{tail}")

    def stop(self) -> None:
        """End the process as an operator would, with SIGTERM; kill it only when it does not follow."""
        if self.stopped or self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.stopped = True


def start_service(name: str, *args: str, url: str, folder: Path, environment: Mapping[str, str]) -> Service:
    """Start `loractl ARGS` in the background with its output in `folder/NAME.log`."""
    log = folder / f"{name}.log"
    with log.open("wb") as stream:
        # A session of its own, so that Ctrl-C reaches the demo first and the services are ended in order.
        process = subprocess.Popen(
            [LORACTL, *args],
            env=dict(os.environ) | dict(environment),
            stdout=stream,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    return Service(name=name, url=url, log=log, process=process)


@contextlib.contextmanager
def heartbeat(console: Console, what: str, *, every_s: float = 5.0) -> Iterator[None]:
    """Say every few seconds that `what` still goes on: a spinner on a terminal, lines elsewhere."""
    start = time.monotonic()
    if console.is_terminal:
        with console.status(what):
            yield
        return
    over = threading.Event()

    def speak() -> None:
        while not over.wait(every_s):
            console.print(f"  {what} ... {time.monotonic() - start:.0f} s", highlight=False)

    thread = threading.Thread(target=speak, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
