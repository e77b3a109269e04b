"""benchmarks.tune: candidates in the sources, and the choice among them."""

from __future__ import annotations

import pytest

from benchmarks import tune

LINE = "constexpr Tile kTile ="


@pytest.fixture
def kernel(tmp_path, monkeypatch) -> tune.Tunable:
    monkeypatch.setattr(tune, "ROOT", tmp_path)
    (tmp_path / "kernel.cuh").write_text(f"// before\n{LINE} {{1, 2}};  // why\n// after\n")
    return tune.Tunable("kernel", "kernel.cuh", LINE, ("{1, 2}", "{3, 4}", "{5, 6}"), (9, 0), ("op",))


def value(kernel: tune.Tunable) -> str:
    return kernel.read((tune.ROOT / kernel.path).read_text())


def run(kernel, seconds: dict[str, float | None], record=None, in_time=lambda: True, broken=()) -> tuple[bool, dict]:
    record = {} if record is None else record
    done = tune.tune(
        kernel,
        record,
        lambda: None,
        in_time,
        lambda: "does not build" if value(kernel) in broken else None,
        lambda tunable: (seconds[value(tunable)], "" if seconds[value(tunable)] else "wrong"),
    )
    return done, record


def test_the_fastest_stays_and_the_rest_of_the_source_too(kernel):
    done, record = run(kernel, {"{1, 2}": 3.0, "{3, 4}": 1.0, "{5, 6}": 2.0})
    assert done and record["kernel"]["winner"] == "{3, 4}"
    assert (tune.ROOT / kernel.path).read_text() == f"// before\n{LINE} {{3, 4}};  // why\n// after\n"
    assert "| kernel | `{3, 4}` | 1000000.0 us | winner |" in tune.summary(record)
    assert "`{1, 2}` | 3000000.0 us | before |" in tune.summary(record)


def test_what_is_wrong_or_does_not_build_never_wins(kernel):
    done, record = run(kernel, {"{1, 2}": 3.0, "{3, 4}": None, "{5, 6}": 1.0}, broken=["{5, 6}"])
    assert done and value(kernel) == "{1, 2}"
    assert "does not build" in tune.summary(record) and "wrong" in tune.summary(record)


def test_nothing_that_works_leaves_the_source_alone(kernel):
    done, record = run(kernel, dict.fromkeys(kernel.candidates))
    assert done and record["kernel"]["winner"] is None and value(kernel) == "{1, 2}"


def test_a_run_out_of_time_goes_on_where_it_stopped(kernel):
    times = iter((True, True, False))
    done, record = run(kernel, {"{1, 2}": 3.0, "{3, 4}": 2.0}, in_time=lambda: next(times))
    assert not done and value(kernel) == "{1, 2}" and "winner" not in record["kernel"]
    done, record = run(kernel, {"{5, 6}": 1.0}, record)  # the others are not measured again
    assert done and value(kernel) == "{5, 6}"


def test_another_version_of_the_source_is_measured_anew(kernel):
    _, record = run(kernel, {"{1, 2}": 3.0, "{3, 4}": 1.0, "{5, 6}": 2.0})
    path = tune.ROOT / kernel.path
    path.write_text(path.read_text().replace("after", "changed"))
    _, record = run(kernel, {"{1, 2}": 1.0, "{3, 4}": 3.0, "{5, 6}": 2.0}, record)
    assert value(kernel) == "{1, 2}"


def test_an_interrupted_run_gives_the_source_its_tile_back(kernel):
    def interrupted(tunable):
        assert value(tunable) == "{1, 2}" or value(tunable) == "{3, 4}"
        if value(tunable) == "{3, 4}":
            raise KeyboardInterrupt
        return 1.0, ""

    with pytest.raises(KeyboardInterrupt):
        tune.tune(kernel, {}, lambda: None, lambda: True, lambda: None, interrupted)
    assert value(kernel) == "{1, 2}"


def test_the_declared_kernels_have_one_of_their_candidates():
    found = tune.tunables()
    assert found and len({tunable.name for tunable in found}) == len(found)
    for tunable in found:
        text = (tune.ROOT / tunable.path).read_text()
        assert tunable.read(text) in tunable.candidates, tunable
        assert tunable.write(text, tunable.read(text)) == text
        assert len(tunable.candidates) > 1


def test_list_needs_no_gpu(capsys):
    assert tune.main(["--list"]) == 0
    assert "; now {" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        tune.main(["--only", "no such kernel"])
