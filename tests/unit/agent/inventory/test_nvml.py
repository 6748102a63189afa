from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pynvml
import pytest
from tests.support.hosts import FIXTURES, FakeNvml, put_up

from gamenode.agent.inventory import gpu, nvml
from gamenode.agent.inventory.collector import Collector, CollectorSettings, parts_of
from gamenode.domain.inventory import Gpu, GpuDriver
from gamenode.lib.clock import SystemClock


def _answers() -> dict[str, Any]:
    answers: dict[str, Any] = json.loads((FIXTURES / "dual-socket-4gpu/nvml.json").read_text())
    return answers


class _Failing(FakeNvml):
    """A library that fails where the test says."""

    def __init__(self, *, init: int | None = None, handle: int | None = None) -> None:
        super().__init__(_answers())
        self._init = init
        self._handle = handle

    def nvmlInit(self) -> None:  # noqa: N802 - the library's name
        if self._init is not None:
            raise pynvml.NVMLError(self._init)
        super().nvmlInit()

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:  # noqa: N802 - the library's name
        if self._handle is not None:
            raise pynvml.NVMLError(self._handle)
        return super().nvmlDeviceGetHandleByIndex(index)


def test_what_a_card_does_not_support_is_absent() -> None:
    card = {"name": "Tesla K10", "uuid": "GPU-1"}

    seen = nvml.collect(FakeNvml({"driver": "470.1", "cuda": 11040, "gpus": [card]}))

    assert seen == (
        (Gpu(vendor="NVIDIA", model="Tesla K10", uuid="GPU-1", driver_version="470.1"),),
        GpuDriver(driver_version="470.1", compute_version="11.4"),
    )


@pytest.mark.parametrize(
    "error",
    [
        pynvml.NVML_ERROR_LIBRARY_NOT_FOUND,
        pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
        pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
    ],
)
def test_cards_without_their_driver_are_shown_as_the_bus_shows_them(
    tmp_path: Path, error: int
) -> None:
    host = put_up("dual-socket-4gpu", tmp_path)

    gpus, driver = gpu.collect(host.root, lambda: nvml.collect(_Failing(init=error)))

    assert [it.pci_address for it in gpus] == [
        "0000:18:00.0",
        "0000:3b:00.0",
        "0000:86:00.0",
        "0000:af:00.0",
    ]
    assert {(it.vendor, it.memory_bytes) for it in gpus} == {("NVIDIA", None)}
    assert driver == GpuDriver()


async def test_a_card_that_fell_off_the_bus_is_a_failure_not_a_missing_card(
    tmp_path: Path,
) -> None:
    library = FakeNvml(_answers())
    host = put_up("dual-socket-4gpu", tmp_path)
    libraries = iter((library, _Failing(handle=pynvml.NVML_ERROR_GPU_IS_LOST)))
    collector = Collector(
        parts_of(replace(host, nvidia=lambda: nvml.collect(next(libraries)))),
        clock=SystemClock(),
        settings=CollectorSettings(),
    )
    before = await collector.collect()

    after = await collector.collect()

    assert [it.part for it in after.failed] == ["gpu"]
    assert "GPU is lost" in after.failed[0].reason
    assert after.hash == before.hash
    assert library.open == 0  # let go of, or the driver could not be unloaded


def test_a_host_without_an_nvidia_card_never_loads_its_library(tmp_path: Path) -> None:
    host = put_up("amd-gpu-desktop", tmp_path)

    def load() -> gpu.Seen | None:
        raise AssertionError("it was asked")

    gpus, _ = gpu.collect(host.root, load)

    assert [it.vendor for it in gpus] == ["AMD"]
