"""The counters of benchmarks/conv_counters.py are what the emulator counts when the same launches run."""

from __future__ import annotations

import pytest

from benchmarks import conv, conv_counters

pytestmark = pytest.mark.emulated

# IMAGESxCHANNELSxHEIGHTxWIDTHxFILTERSxKERNELxSTRIDExPADDINGxGROUPS, and the forward's pool.
SHAPES = {
    "128x128 tile": ((1, 16, 9, 16, 72, 3, 1, 1, 1), None),
    "128x64 tile, windows": ((2, 8, 10, 9, 24, 3, 1, 1, 1), (2, 2, 0)),
    "64x64 tile, box": ((1, 8, 7, 6, 16, 3, 1, 1, 1), (3, 2, 1)),
    "single elements, stride 2, box": ((1, 5, 17, 18, 10, 3, 2, 1, 1), (3, 2, 1)),
    "stem in chunks": ((2, 3, 20, 32, 40, 5, 2, 2, 1), (3, 2, 1)),
    "stem by elements, odd step": ((1, 3, 17, 18, 70, 3, 1, 1, 1), None),
    "groups, stride 2": ((1, 16, 8, 7, 32, 3, 2, 1, 2), None),
    "1x1, stride 2": ((2, 8, 5, 5, 8, 1, 2, 0, 1), None),
}


@pytest.mark.parametrize("direction", conv_counters.DIRECTIONS)
@pytest.mark.parametrize("name", SHAPES)
def test_counters_are_the_emulators(name, direction):
    shape, pool = SHAPES[name]
    control = conv_counters.library("race").control
    control.set_options(multiprocessors=1 if "128" in name else 8)
    control.reset_counters()
    found = conv_counters.count(shape, direction, pool if direction == "forward" else None, build="race", run=True)
    seen = control.counters()
    assert found.products == found.counted > 0
    assert (found.loads, found.stores) == (seen["global_load_bytes"], seen["global_store_bytes"])
    assert found.launches == seen["launches"]


def test_committed_table_is_what_the_program_writes():
    assert conv_counters.TABLE.read_text() == conv_counters.markdown()


def test_the_main_path_issues_what_is_useful():
    """C, K >= 64, 3x3 and 1x1 forward: at most 7% more than the floor."""
    conv_counters.library().control.set_options(multiprocessors=conv_counters.MULTIPROCESSORS)
    for shape in conv.SHAPES["cuda"]:
        if shape[1] >= 64 and shape[4] >= 64 and shape[-1] == 1:
            issued = conv_counters.count(shape, "forward").products * 2 * 16 * 8 * 16
            assert 1 <= issued / conv.count_flops(shape)["forward"] < 1.07, shape
