"""NVIDIA's GPUs, as their driver describes them through its management library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import pynvml

from gamenode.domain.inventory import Gpu, GpuDriver

_ARCHITECTURES: Final = {
    2: "Kepler",
    3: "Maxwell",
    4: "Pascal",
    5: "Volta",
    6: "Turing",
    7: "Ampere",
    8: "Ada",
    9: "Hopper",
    10: "Blackwell",
}


def collect(nvml: Any = pynvml) -> tuple[tuple[Gpu, ...], GpuDriver] | None:
    """Return NVIDIA's GPUs and their driver; None where its driver is not installed or loaded.

    Each value that a device does not support is absent.

    Raises:
        pynvml.NVMLError: the driver is there and does not answer, or a GPU has fallen off the bus.
    """
    try:
        nvml.nvmlInit()
    except (
        pynvml.NVMLError_LibraryNotFound,
        pynvml.NVMLError_DriverNotLoaded,
        pynvml.NVMLError_LibRmVersionMismatch,
    ):
        # The last: the driver was updated and the host not restarted; sysfs still shows the cards.
        return None
    try:
        driver = _word(nvml.nvmlSystemGetDriverVersion)
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        return (
            tuple(_gpu(nvml, handle, driver) for handle in handles),
            GpuDriver(driver_version=driver, compute_version=_cuda_version(nvml)),
        )
    finally:
        nvml.nvmlShutdown()


def _gpu(nvml: Any, handle: Any, driver: str | None) -> Gpu:
    memory = _answer(nvml.nvmlDeviceGetMemoryInfo, handle)
    milliwatts = _answer(nvml.nvmlDeviceGetPowerManagementLimit, handle)
    capability = _answer(nvml.nvmlDeviceGetCudaComputeCapability, handle)
    architecture = _answer(nvml.nvmlDeviceGetArchitecture, handle)
    pci = _answer(nvml.nvmlDeviceGetPciInfo, handle)
    return Gpu(
        vendor="NVIDIA",
        model=_word(nvml.nvmlDeviceGetName, handle),
        memory_bytes=int(memory.total) if memory is not None else None,
        architecture=_ARCHITECTURES.get(architecture),
        driver_version=driver,
        compute_capability=f"{capability[0]}.{capability[1]}" if capability is not None else None,
        power_watts=milliwatts / 1000 if milliwatts is not None else None,
        cuda_cores=_answer(nvml.nvmlDeviceGetNumGpuCores, handle),
        uuid=_word(nvml.nvmlDeviceGetUUID, handle),
        pci_address=_pci_address(_text(pci.busId)) if pci is not None else None,
    )


def _cuda_version(nvml: Any) -> str | None:
    version = _answer(nvml.nvmlSystemGetCudaDriverVersion_v2)  # 12040 is 12.4
    return f"{version // 1000}.{version % 1000 // 10}" if version is not None else None


def _pci_address(bus_id: str) -> str:
    """Return the address as sysfs writes it; the library has eight digits for the domain."""
    domain, _, rest = bus_id.lower().partition(":")
    return f"{domain[-4:]}:{rest}"


def _word(ask: Callable[..., Any], *arguments: Any) -> str | None:
    answer = _answer(ask, *arguments)
    return _text(answer) if answer is not None else None


def _text(answer: str | bytes) -> str:
    return answer.decode() if isinstance(answer, bytes) else answer  # older versions: bytes


def _answer(ask: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return ask(*arguments)
    except (
        pynvml.NVMLError_NotSupported,
        pynvml.NVMLError_NoPermission,
        pynvml.NVMLError_FunctionNotFound,
        pynvml.NVMLError_NotFound,
    ):
        return None
