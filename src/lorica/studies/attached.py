"""`python -m lorica.studies.attached WORDS`: `lorica WORDS`, until it is done or the process that started it is gone.

The other end of standard input is held by whoever started this. The kernel closes it however that process ends, and
what runs here is then stopped as by SIGTERM: a training run saves where it stands.
"""

from __future__ import annotations

import os
import runpy
import signal
import threading


def main() -> None:
    """Run the command line on the words of this process."""
    threading.Thread(target=_stop_with_the_other_end, daemon=True).start()
    runpy.run_module("lorica", run_name="__main__", alter_sys=True)


def _stop_with_the_other_end() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
