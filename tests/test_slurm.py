"""The Slurm profile on a real Slurm: one node on loopback, from Debian's packages; skipped, with the reason, elsewhere."""
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from patchmix_repro.plan import steps_of, sweep_of

CONF = Path("/etc/slurm/slurm.conf")  # jobs are started without our environment, so that Slurm reads its own place
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "sinfo")


def lacking():
    "Why there can be no Slurm of our own here; empty: there can."
    if importlib.util.find_spec("snakemake_executor_plugin_slurm") is None:
        return "the Slurm executor is not installed; the extra 'cluster' brings it"
    if missing := [name for name in PROGRAMS if shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin") is None]:
        return f"{', '.join(missing)} not found; on Debian: apt-get install slurmctld slurmd slurm-client munge"
    if os.getuid() != 0:
        return "starting a Slurm node needs root"
    return "a Slurm is configured on this machine already" if CONF.exists() else ""


pytestmark = pytest.mark.skipif(bool(lacking()), reason=lacking() or "-")

TEMPLATE = """ClusterName=loop
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=6000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    "munged, slurmctld and slurmd for as long as the tests last."
    folder, host = tmp_path_factory.mktemp("slurm"), socket.gethostname().partition(".")[0]
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    CONF.parent.mkdir(exist_ok=True)
    CONF.write_text(TEMPLATE.format(folder=folder, host=host, cpus=os.cpu_count()))
    path = {**os.environ, "PATH": os.environ["PATH"] + ":/usr/sbin"}
    started = []
    try:
        munge = ["munged", "--foreground", "--force", "--key-file", key, "--socket", folder / "munge.socket", "--pid-file", folder / "munged.pid", "--log-file", folder / "munged.log", "--seed-file", folder / "munge.seed"]
        for command in (munge, ["slurmctld", "-D"], ["slurmd", "-D"]):
            started.append(subprocess.Popen(list(map(str, command)), env=path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            time.sleep(2)
        deadline = time.monotonic() + 60
        while "idle" not in (state := subprocess.run(["sinfo", "-h", "-o", "%T"], env=path, capture_output=True, text=True).stdout):
            assert time.monotonic() < deadline, f"the node did not come up: {state}"
            time.sleep(1)
        yield folder
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(30)
        CONF.unlink()


def test_steps_run_as_slurm_jobs(slurm, graph, tmp_path):
    sweep = {"subset": "smoke", "folder": str(tmp_path / "sweep")}
    steps = steps_of(sweep_of(sweep))
    last = next(step for step in steps.values() if step.kind == "evaluate")
    target = f"{sweep['folder']}/notebooks/{last.name}.ipynb"
    done = subprocess.run([sys.executable, "-m", "snakemake", "--workflow-profile", "workflow/profiles/slurm", "--slurm-init-seconds-before-status-checks", "5", "--config", *(f"{key}={value}" for key, value in sweep.items()), "--", target],
                          cwd=graph, capture_output=True, text=True, timeout=600)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-4000:]
    assert said.count("has been submitted with SLURM jobid") == 2, "the training and its measurement are two jobs"
    assert Path(target).is_file() and list((tmp_path / "sweep" / "measured" / last.name / "records").glob("battery-*.parquet"))
    assert "runtime=1440" in said, "the profile's resources reach the job"
