"""Start `gamenode dev`, run the example with its log on the terminal, stay up until Ctrl-C.

    python tools/demo.py [--once]     # --once stops after the pipeline, with its exit code

Other addresses and another data folder: GAMENODE_SERVER__HTTP, GAMENODE_SERVER__GRPC, DEMO_DATA.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GAMENODE = Path(sys.executable).with_name("gamenode")
READY = "is ready"


def main() -> int:
    """Return the exit code of the demo."""
    dev = subprocess.Popen(
        [
            GAMENODE,
            "dev",
            "--runtime",
            "process",
            "--data",
            os.environ.get("DEMO_DATA", "gamenode-data"),
        ],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C reaches it once, through us
    )
    assert dev.stdout is not None
    status = 1
    try:
        address = ""
        for line in dev.stdout:
            print(line, end="", flush=True)
            if line.strip().startswith("web "):
                address = line.split()[1].rstrip("/")
            if line.startswith("Try:"):
                break
        if not address:
            return dev.wait() or 1
        run = [str(GAMENODE), "--url", address, "run", str(ROOT / "examples" / "hello.yaml")]
        status = subprocess.run(run, check=False).returncode
        if "--once" not in sys.argv:
            print(
                f"\nOpen {address}/ or run gamenode yourself; Ctrl-C ends everything.", flush=True
            )
            dev.wait()
    except KeyboardInterrupt:
        print(flush=True)
    finally:
        if dev.poll() is None:
            with suppress(ProcessLookupError):
                dev.send_signal(signal.SIGTERM)
            dev.wait()
    return status


if __name__ == "__main__":
    sys.exit(main())
