"""Kernels forked from a process that has torch, timm and matplotlib loaded: to import them takes longer than most notebooks of the tests."""
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

from jupyter_client.provisioning import local_provisioner

ROOT = Path(__file__).resolve().parents[1]
# not pandas, whose options depend on where it is imported; not the library: a record names the modules of it that its run has imported
LOADED = ("ipykernel.kernelapp", "ipykernel.zmqshell", "matplotlib.pyplot", "pyarrow.parquet", "scipy.stats", "torch", "torchvision.transforms.v2", "timm", "accelerate")


def kernel(command, environment, folder):
    "What `python -m ipykernel_launcher` does, in a session of its own."
    os.setsid()
    os.environ.clear()
    os.environ.update(environment | {"JPY_PARENT_PID": str(os.getppid())})
    os.chdir(folder)
    sys.path[:] = [*filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)), *(path for path in sys.path if path and Path(path) not in (ROOT, ROOT / "tests"))]
    sys.argv = command[2:]
    import matplotlib
    from ipykernel.kernelapp import IPKernelApp

    app = IPKernelApp.instance(parent_handle=os.getppid())
    app.initialize(command[3:])
    if "MPLBACKEND" in environment:
        matplotlib.use(environment["MPLBACKEND"])
    else:
        app.shell.enable_matplotlib("inline")
    app.start()


class Forked:
    "The part of `subprocess.Popen` that jupyter_client asks for."

    stdin = stdout = stderr = None

    def __init__(self, context, *given):
        self.process = context.Process(target=kernel, args=given)
        self.process.start()
        self.pid = self.process.pid
        while self.poll() is None and os.getpgid(self.pid) != self.pid:  # signals go to its group, which has to be its own
            time.sleep(0.005)

    def poll(self):
        return self.process.exitcode

    def wait(self, timeout=None):
        self.process.join(timeout)
        return self.process.exitcode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def warm():
    "Let jupyter_client fork the kernels that this process starts."
    context, usual = multiprocessing.get_context("forkserver"), local_provisioner.launch_kernel
    context.set_forkserver_preload(list(LOADED))

    def launch_kernel(cmd, cwd=None, env=None, **others):
        ours = cmd[0] == sys.executable and cmd[1:3] == ["-m", "ipykernel_launcher"]
        return Forked(context, cmd, dict(os.environ if env is None else env), cwd or os.getcwd()) if ours else usual(cmd, cwd=cwd, env=env, **others)

    launch_kernel.usual = usual
    local_provisioner.launch_kernel = launch_kernel
