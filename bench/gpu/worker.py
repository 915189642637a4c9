# SPDX-License-Identifier: Apache-2.0
"""One stage in this process: ``python -m gpu.worker STAGE OUT --seconds S``."""

from __future__ import annotations

import argparse
import importlib
import os
import time
import traceback
from pathlib import Path

from gpu.record import Record
from gpu.stages import BY_NAME


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("stage", choices=list(BY_NAME))
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    record = Record(options.out, options.stage, options.seconds)
    record.save()
    if os.environ.get("FASTVIT_GPU_FAIL") == options.stage:
        # For the test that a stage's death costs nothing else.
        print("told to die", flush=True)
        os._exit(7)
    try:
        # Inside: torch itself may be what fails.
        from gpu import device as devices
        from gpu.machine import describe
        from gpu.origin import sources

        device = devices.open_device(dry=options.dry)
        record.data |= {"dry": options.dry, "date": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        record.data |= {"machine": describe(device), "fingerprint": sources()}
        record.data["before"] = device.state()
        importlib.import_module(f"gpu.{options.stage}").run(device, record)
        record.data["after"] = device.state()
    # What was recorded until then stays, and the failure is recorded beside it.
    except Exception as error:
        traceback.print_exc()
        first = (str(error).strip().splitlines() or [""])[0]
        record.fail(f"{type(error).__name__}: {first}")
    return 0 if record.close() else 1


if __name__ == "__main__":
    raise SystemExit(main())
