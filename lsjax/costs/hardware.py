"""The known accelerators: what one device can do, and how devices are wired together.

Numbers are the vendors' data sheets (dense bfloat16), and for TPU links the one-way figures of "How to Scale Your
Model" (jax-ml.github.io/scaling-book).
"""

import math
import re
from typing import NamedTuple

from lsjax.errors import UserError

GIB = 2**30


class Chip(NamedTuple):
    """One kind of device. Rates are per second.

    device_kind: the name that JAX gives to the device.
    peak_flops: dense bfloat16.
    link_bandwidth: bytes that one device can receive from its neighbours (all ICI links of a TPU, or NVLink).
    network_bandwidth: bytes that one device can receive from other hosts; 0 when the links reach them too.
    dimensions: of the wiring, a 2D or 3D torus; GPUs have 2, hosts x GPUs per host.
    """

    name: str
    platform: str
    device_kind: str
    peak_flops: float
    memory_bytes: int
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float = 0.0
    dimensions: int = 2


CHIPS = {
    chip.name: chip
    for chip in (
        # For TPUs, memory_bytes is what the compiler lets a program use.
        Chip("tpu:v4", "tpu", "TPU v4", 275e12, int(30.75 * GIB), 1.23e12, 6 * 45e9, dimensions=3),
        Chip("tpu:v5e", "tpu", "TPU v5 lite", 197e12, int(15.75 * GIB), 0.82e12, 4 * 45e9),
        Chip("tpu:v5p", "tpu", "TPU v5", 459e12, int(95.74 * GIB), 2.77e12, 6 * 90e9, dimensions=3),
        Chip("tpu:v6e", "tpu", "TPU v6 lite", 918e12, int(31.25 * GIB), 1.64e12, 4 * 90e9),
        Chip("gpu:a100-40", "gpu", "NVIDIA A100-SXM4-40GB", 312e12, 42_297_786_368, 1.555e12, 300e9, 25e9),
        Chip("gpu:a100-80", "gpu", "NVIDIA A100-SXM4-80GB", 312e12, 85_045_280_768, 2.039e12, 300e9, 25e9),
        Chip("gpu:h100", "gpu", "NVIDIA H100 80GB HBM3", 989e12, 84_978_434_048, 3.352e12, 450e9, 50e9),
        Chip("gpu:h200", "gpu", "NVIDIA H200", 989e12, 150_754_820_096, 4.8e12, 450e9, 50e9),
    )
}


class Topology(NamedTuple):
    """Devices of one kind: a TPU slice of `shape` chips, or GPUs with `shape` = (hosts, GPUs per host)."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Returns the number of devices."""
        return math.prod(self.shape)

    @property
    def devices_per_host(self) -> int | None:
        """Returns the number of GPUs per host, which share a slower network; None for TPUs, whose links are alike."""
        return self.shape[1] if self.chip.platform == "gpu" else None

    def __str__(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"


def parse_topology(text: str) -> Topology:
    """Parses a topology such as "tpu:v5p:4x4x4" (chips along each axis) or "gpu:h100:8x8" (hosts x GPUs per host).

    "gpu:h100:8" is one host. Raises UserError that lists the known chips, or says how many axes this one has.
    """
    name, _, sizes = text.rpartition(":")
    chip = CHIPS.get(name)
    if chip is None:
        raise UserError(f"--topology is {text!r}; it must be CHIP:SIZE with a chip of {', '.join(CHIPS)}")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes):
        raise UserError(f"--topology is {text!r}; the size must be numbers with x between them, such as 8x8")
    shape = tuple(map(int, sizes.split("x")))
    if chip.platform == "gpu" and len(shape) == 1:
        shape = (1, *shape)
    if len(shape) != chip.dimensions:
        wanted = "HOSTSxGPUS" if chip.platform == "gpu" else "x".join("N" * chip.dimensions)
        raise UserError(f"--topology is {text!r}; a size of {name} is {wanted}")
    return Topology(chip, shape)


def chip_of(device_kind: str) -> Chip | None:
    """Finds a chip by the name that JAX gives to the device; None when it is not in the table (a CPU, for example)."""
    kinds = {chip.device_kind: chip for chip in CHIPS.values()}
    kinds |= {"TPU v5p": CHIPS["tpu:v5p"], "TPU v5e": CHIPS["tpu:v5e"], "TPU v6e": CHIPS["tpu:v6e"]}
    kinds |= {"NVIDIA A100": CHIPS["gpu:a100-80"], "NVIDIA H100": CHIPS["gpu:h100"]}
    fitting = [kind for kind in kinds if device_kind.startswith(kind)]
    return kinds[max(fitting, key=len)] if fitting else None
