"""What one front carries, measured with engines that cost nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SHAPES = Path(__file__).parents[2] / "examples" / "shapes"
# The most by which two differences of processor times can disagree: user and system time are each cut to whole ticks.
READING = 4 / os.sysconf("SC_CLK_TCK")


def test_both_workloads_are_measured_with_two_stub_engines(tmp_path: Path) -> None:
    given = ["--replicas", "2", "--step-ms", "2", "--batch", "4", "--answers", "1"]
    command = [sys.executable, "-m", "bench.scale", "--model", str(SHAPES), "--out", str(tmp_path), *given]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [*runs] == ["streams, 2 replicas", "images, 2 replicas"]
    for name, row in runs.items():
        assert row["outcomes"] == {"200": row["requests"]}
        beyond = (row["loop_cores"] - row["front_cores"]) * row["seconds"]
        assert beyond < READING, "the event loop's thread is one of the process"
        assert f"| {name} | {row['load']['streams']} | {row['requests_per_s']:.0f} |" in done.stdout
    log = (tmp_path / "2.log").read_text()
    assert "2 of 2 replicas, float32, attention stub" in log
