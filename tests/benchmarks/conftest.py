"""A run of the benchmarks leaves one record in runs/benchmarks, which `publish` can bring to results/."""

import pandas as pd

from patchmix_repro import store
from patchmix_repro.core import project_root


def pytest_benchmark_update_json(config, benchmarks, output_json):
    "File every ratio of the run: one row a benchmark and quantity."
    rows = [
        {"benchmark": b["name"], "quantity": name, "value": float(value)}
        for b in output_json["benchmarks"]
        for name, value in b["extra_info"].items()
        if isinstance(value, (int, float))
    ]
    record = store.new_record("benchmark", {"rounds": "in turns"}, seed=0, data={}, metrics={"quantities": len(rows)}, tables={"ratios": pd.DataFrame(rows)})
    print("filed", store.append(record, project_root() / "runs" / "benchmarks").name)
