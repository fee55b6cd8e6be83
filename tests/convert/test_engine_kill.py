"""The engine, killed at every line and at the joints, and resumed: bit for bit what it would have been."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from mlx_dgemma.convert import engine, shards
from mlx_dgemma.convert.journal import JOURNAL, Journal
from tests.convert.fixtures import contents
from tests.convert.jobs import MODULES, convert, is_loadable, partial


def forked(call: Callable[[], None]) -> int:
    """The signal that ended a copy of this process, or 0; MLX's threads and GPU do not survive a fork."""
    child = os.fork()
    if child == 0:
        try:
            engine.mx = SimpleNamespace(clear_cache=lambda: None)
            call()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(99)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    return -status


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_line(number: int) -> Counter:
    """SIGKILL when this line of mlx_dgemma.convert is the next, counted over all threads."""
    lines = Counter()

    def trace(frame, event, _):
        if "convert/" not in frame.f_code.co_filename.replace(os.sep, "/") or "tests" in frame.f_code.co_filename:
            return None
        if event == "line":
            lines["run"] += 1
            if lines["run"] == number:
                die()
        return trace

    threading.settrace(trace)
    sys.settrace(trace)
    return lines


def kill_everywhere(folder: Path, step: int) -> None:
    """Killed at every `step`-th line, resumed; then killed again and again until it is done."""
    convert(folder / "whole")
    whole, out, kills = contents(folder / "whole"), folder / "out", Counter()

    def killed(number):
        def call():
            kill_at_line(number)
            convert(out)

        return forked(call)

    def check():
        work = partial(out)
        if is_loadable(work):
            assert {name: data for name, data in contents(work).items()} == whole
        if out.exists():
            assert contents(out) == whole
        kills["journal"] += (work / JOURNAL).exists() and (work / JOURNAL).stat().st_size > 0
        kills["all"] += 1

    number = 1
    while killed(number):
        check()
        if not out.exists():
            assert not forked(lambda: convert(out))
        assert contents(out) == whole, number
        shutil.rmtree(out)
        number += step
    shutil.rmtree(out)
    # each run gets a little further: through the lines of resuming and those of a job
    number = 700
    while not out.exists() and killed(number):
        check()
        number += 25
    assert contents(out) == whole
    print(json.dumps(kills))


def kill_at(folder: Path) -> None:
    """Killed at the joints, and what is found there."""
    convert(folder / "whole")
    whole = contents(folder / "whole")

    def before(owner, name, time):
        real, calls = getattr(owner, name), Counter()

        def replaced(*args, **options):
            calls["all"] += 1
            return die() if calls["all"] == time else real(*args, **options)

        setattr(owner, name, replaced)

    joints = {
        "first chunk": (shards.TensorWriter, "write", 1, 0),
        "in a job": (shards.TensorWriter, "write", 20, 1),
        "data is on disk, the journal does not know": (Journal, "add", 3, 2),
        "all jobs are done": (engine, "_complete", 1, MODULES),
        "some shards have their names": (Path, "rename", 2, MODULES),
        "before the first side file": (engine, "_put", 1, MODULES),
        "before config.json": (engine, "_put", 3, MODULES),
        "before the rename": (os, "rename", 4, MODULES),
    }
    for joint, (owner, name, time, done) in joints.items():
        out = folder / joint.replace(" ", "-")

        def call(out=out, owner=owner, name=name, time=time):
            before(owner, name, time)
            convert(out)

        assert forked(call), joint
        assert not out.exists(), joint
        assert is_loadable(partial(out)) == (joint == "before the rename"), joint
        assert len((partial(out) / JOURNAL).read_text().splitlines()) == 1 + done, joint
        chunked = Counter()
        convert(out, chunked)
        assert contents(out) == whole, joint
        assert len(chunked) == MODULES - done, joint


def in_process_of_its_own(call: str, *args: object) -> str:
    code = f"from pathlib import Path; from tests.convert.test_engine_kill import *; {call}"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return done.stdout


def test_killed_at_any_line_and_resumed_it_is_bit_identical(tmp_path):
    kills = json.loads(in_process_of_its_own("kill_everywhere(Path(sys.argv[1]), 29)", tmp_path))
    assert kills["all"] >= 40 and kills["journal"] >= 30


def test_killed_at_the_joints(tmp_path):
    in_process_of_its_own("kill_at(Path(sys.argv[1]))", tmp_path)
