"""A forked kernel is what a fresh one is: folder, environment, figures, tables, and no module of the library."""
import pytest
from jupyter_client.provisioning import local_provisioner
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

ASKED = """
import os, sys, __main__
print(os.getcwd(), os.environ["ASKED"], os.environ["MPLBACKEND"], [name for name in sys.modules if name.startswith("patchmix_repro")], os.getpgid(0) == os.getpid(), __name__)
import matplotlib.pyplot as plt
import pandas as pd
print(pd.get_option("display.max_columns"), pd.get_option("display.width"), plt.rcParams["figure.dpi"])
plt.plot([1, 2]);
"""


def answered(folder):
    client = NotebookClient(new_notebook(cells=[new_code_cell(ASKED)]), kernel_name="python3", timeout=300)
    outputs = client.execute(cwd=str(folder)).cells[0].outputs
    return [output.get("text") or output["data"]["image/png"] for output in outputs if output.get("text") or "image/png" in output["data"]]


def test_a_forked_kernel_is_what_a_fresh_one_is(monkeypatch, tmp_path):
    monkeypatch.setenv("ASKED", "passed on")
    monkeypatch.delenv("MPLBACKEND", raising=False)
    forked = answered(tmp_path)
    monkeypatch.setattr(local_provisioner, "launch_kernel", local_provisioner.launch_kernel.usual)
    assert forked == answered(tmp_path)
    assert "passed on" in forked[0] and forked[-1].startswith("iVBOR"), "the variable and the picture"


def test_a_forked_kernel_that_is_killed_is_known_to_be_dead(tmp_path):
    with pytest.raises(Exception, match="died"):
        NotebookClient(new_notebook(cells=[new_code_cell("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")]), kernel_name="python3", timeout=60).execute(cwd=str(tmp_path))
