# SPDX-License-Identifier: Apache-2.0
"""Clocks, temperature and power of a GPU around every contest.

The driver's library is asked directly: ``nvidia-smi`` takes 50 ms, as long as a contest.
"""

from __future__ import annotations

import ctypes
from typing import Any

#: A contest whose clock has changed by more between its first and its last round is marked.
STEADY = 0.05

# Numbers of NVML's interface.
_SM, _MEMORY, _CHIP = 1, 2, 0


class Clocks:
    """Readings of one GPU.

    Args:
        uuid: as ``torch.cuda.get_device_properties`` has it.
        library: NVML, or something with its functions.

    Raises:
        OSError: NVML is not there, or does not know the GPU.
    """

    def __init__(self, uuid: str, library: Any = None) -> None:
        self._library = library or ctypes.CDLL("libnvidia-ml.so.1")
        self._handle = ctypes.c_void_p()
        self._call("nvmlInit_v2")
        name = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
        self._call("nvmlDeviceGetHandleByUUID", name.encode(), ctypes.byref(self._handle))

    def read(self) -> dict[str, float]:
        """MHz of the multiprocessors and of the memory, degrees Celsius, watts, and the driver's
        reasons not to clock higher as a bit mask; what cannot be asked is left out.
        """
        found: dict[str, float] = {}
        for key, function, arguments, scale in (
            ("sm_mhz", "nvmlDeviceGetClockInfo", (_SM,), 1.0),
            ("memory_mhz", "nvmlDeviceGetClockInfo", (_MEMORY,), 1.0),
            ("celsius", "nvmlDeviceGetTemperature", (_CHIP,), 1.0),
            ("watts", "nvmlDeviceGetPowerUsage", (), 1e-3),
            ("limited_by", "nvmlDeviceGetCurrentClocksThrottleReasons", (), 1.0),
        ):
            # The mask has 64 bits; the others fill the lower half of a zero.
            value = ctypes.c_ulonglong(0)
            try:
                self._call(function, self._handle, *arguments, ctypes.byref(value))
            except OSError:
                continue
            found[key] = value.value * scale
        return found

    def _call(self, function: str, *arguments: Any) -> None:
        try:
            status = getattr(self._library, function)(*arguments)
        except AttributeError as error:
            raise OSError(f"NVML has no {function}") from error
        if status:
            raise OSError(f"{function} gave status {status}")


def around(first: dict[str, float], last: dict[str, float]) -> dict[str, Any]:
    """What a contest records: both readings, and whether the clock stayed."""
    found: dict[str, Any] = {"first": first, "last": last}
    before, after = first.get("sm_mhz"), last.get("sm_mhz")
    if before and after:
        found["moved"] = abs(after - before) / max(before, after)
        found["steady"] = found["moved"] <= STEADY
    return found
