"""What tests run in a process of its own, to kill it there: forked from one that has torch loaded, because importing it takes longer than most of this."""
import multiprocessing
import signal
import time


def start(target, *given):
    "The function, begun in a new process; it gets copies of what is given."
    process = multiprocessing.get_context("forkserver").Process(target=target, args=given, daemon=True)  # a failed test leaves none behind
    process.start()
    return process


def kill_when(process, condition, seconds=240):
    "kill -9 as soon as the condition holds; the process must still be running then."
    end = time.monotonic() + seconds
    while not condition():
        assert process.is_alive() and time.monotonic() < end, "the process ended before it could be killed"
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def train(config, hold=None, sign=None):
    "A training; from step `hold` on a save stops half way, for long, and says so by a file."
    from patchmix_repro import state, training

    write = state.save_file

    def torn(tensors, path, *others):
        write(tensors, path, *others)
        if int(str(path).split("step-")[1][:9]) >= hold:
            with open(path, "r+b") as file:
                file.truncate(1000)
            sign.touch()
            time.sleep(600)

    if hold is not None:
        state.save_file = torn
    training.train(config, progress=False)


def evaluate_slowly(n, out):
    "The battery of test_battery.py, by a network that takes its time."
    from test_battery import CONDITIONS, Linear, evaluate, images

    class Slow(Linear):
        def forward(self, x):
            time.sleep(0.005)
            return super().forward(x)

    Slow.__name__ = "Linear"
    evaluate(Slow(), images(n), CONDITIONS, out=out)
