"""What the figures were measured on."""

from __future__ import annotations

import hashlib
import platform
from functools import cache
from pathlib import Path

import torch

_CPU_INFO = Path("/proc/cpuinfo")
_NAMED_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8")


def describe_machine() -> dict[str, str | int]:
    """Processor, instruction sets that matter to kernels, threads in use and library version."""
    return {
        "processor": _cpu_fields().get("model name") or platform.processor() or platform.machine(),
        "isa": " ".join(instruction_sets()) or torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }


def instruction_sets() -> list[str]:
    """Those that matter to kernels, of this CPU; [] where the system does not tell."""
    flags = _cpu_fields().get("flags", "").split()
    return [flag for flag in _NAMED_FLAGS if flag in flags]


def processor_digest() -> str:
    """Of everything that the CPU says it can do: compilers use more than kernels are written for."""
    flags = sorted(_cpu_fields().get("flags", "").split())
    return hashlib.sha256(" ".join(flags).encode()).hexdigest()[:16]


@cache
def _cpu_fields() -> dict[str, str]:
    fields: dict[str, str] = {}
    if _CPU_INFO.is_file():
        for line in _CPU_INFO.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    return fields


def machine_signature(device: torch.device) -> str:
    """What timings of kernels on `device` depend on beside the code, in one line of plain text."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)}; sm_{major}{minor}; torch {torch.__version__}"
    machine = describe_machine()
    return f"{machine['processor']}; {machine['isa']}; {machine['threads']} thread(s); torch {machine['torch']}"
