"""A run of the benchmarks leaves one record in runs/benchmarks, which `publish` can bring to results/."""

import pandas as pd

from patchmix_repro import store
from patchmix_repro.core import project_root


def ratios(benchmarks):
    "One row a benchmark and number of its `extra_info`."
    rows = [(b.name, name, float(value)) for b in benchmarks for name, value in b.extra_info.items() if isinstance(value, (int, float))]
    return pd.DataFrame(rows, columns=["benchmark", "quantity", "value"])


def pytest_sessionfinish(session):
    "File the ratios of this run."
    found = getattr(session.config, "_benchmarksession", None)
    table = ratios(found.benchmarks if found else [])
    if len(table):
        record = store.new_record("benchmark", {"rounds": "in turns", "benchmarks": sorted(table.benchmark.unique())}, seed=0, data={}, metrics={"quantities": len(table)}, tables={"ratios": table})
        print("\nfiled", store.append(record, project_root() / "runs" / "benchmarks").name)
