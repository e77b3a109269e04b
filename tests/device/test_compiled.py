"""What nvcc makes of the conformance kernels: every wrapper its instruction, no spills, no complaints from ptxas."""

from __future__ import annotations

import re
import subprocess

import pytest

from benchmarks import static
from tests.device.libraries import compile_source

pytestmark = pytest.mark.compiled

SM80 = [
    *(f"LDSM\\.16\\.{kind}88{count}" for kind in ("M", "MT") for count in ("", r"\.2", r"\.4")),
    r"HMMA\.16816\.F32\.BF16",
    r"HMMA\.16816\.F32",
    r"HMMA\.1688\.F32\.TF32",
    r"LDGSTS\.E\.BYPASS\.128",
    r"LDG\.E\.STRONG\.GPU",
    r"STG\.E\.STRONG\.GPU",
    r"LDG\.E\.128\.STRONG\.GPU",
    r"STG\.E\.128\.STRONG\.GPU",
    r"LDG\.E\.EF\.128",
    r"STG\.E\.EF\.128",
    r"BAR\.ARV",
    r"MEMBAR\.\w+\.GPU",
]
HOPPER = [
    *(f"HGMMA\\.64x{n}x16\\.F32" for n in range(8, 257, 8)),
    *(f"UTMALDG\\.{rank}D" for rank in range(1, 6)),
    *(f"UTMASTG\\.{rank}D" for rank in range(1, 6)),
    *(f"UTMAREDG\\.{rank}D\\.ADD" for rank in range(1, 6)),
    *(f"UTMALDG\\.{rank}D\\.MULTICAST" for rank in range(1, 6)),
    r"UCGABAR_ARV",
    r"UCGABAR_WAIT",
    *(rf"{access}{width}" for access in (r"LD\.E", r"ST\.E", "STAS") for width in ("", r"\.64", r"\.128")),
    r"SYNCS\.ARRIVE\.TRANS64\.RED",
    r"UBLKCP\.S\.G",
    r"UBLKCP\.G\.S",
    *(rf"UBLKRED\.G\.S\.ADD\.{kind}\.RN" for kind in ("F32", "F16", "BF16")),
    r"UTMACMDFLUSH",
    r"UTMACCTL\.PF",
    r"SYNCS\.PHASECHK\.TRANS64\.TRYWAIT",
    r"USETMAXREG\.DEALLOC",
    r"USETMAXREG\.TRY_ALLOC",
    r"WARPGROUP\.ARRIVE",
    r"STSM\.16\.M88\.4",
    r"MUFU\.EX2",
]


@pytest.mark.parametrize(
    ("source", "arch", "instructions"), [("conformance.cu", "80", SM80), ("conformance_hopper.cu", "90a", HOPPER)]
)
def test_instructions(source, arch, instructions, tmp_path):
    try:
        static.tool("nvcc")
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    cubin = tmp_path / "kernels.cubin"
    said = compile_source(source, arch, cubin, ["-cubin"])
    # C75xx: wgmma serialised, setmaxnreg ignored, an arrive inserted.
    complaints = [line for line in said.splitlines() if "C75" in line or "warning" in line]
    assert not complaints, complaints[:5]
    spills = re.findall(r"(\d+) bytes spill stores", said)
    assert spills and not any(map(int, spills))
    sass = subprocess.run([static.tool("cuobjdump"), "-sass", str(cubin)], capture_output=True, text=True, check=True)
    missing = [pattern for pattern in instructions if not re.search(pattern + r"\b", sass.stdout)]
    assert not missing, missing
