import random
import shutil
from pathlib import Path

import pytest

from ckpt_group import CONTEXT
from ckpt_states import blank_state, holds_step, make_state
from ckpt_victim import save_once_and_die_at, save_until_killed
from titan_ckpt import Checkpointer

KILLS = 6


@pytest.mark.parametrize("asynchronous", [False, True])
def test_killed_at_random_instants(tmp_path: Path, asynchronous: bool) -> None:
    """What `save` said was saved is there, to the bit, whenever the process was killed."""
    delays = random.Random(7)
    for _ in range(KILLS):
        pipe, theirs = CONTEXT.Pipe()
        process = CONTEXT.Process(target=save_until_killed, args=(tmp_path, asynchronous, theirs))
        process.start()
        theirs.close()
        assert pipe.poll(30)
        saved = pipe.recv()
        process.join(delays.uniform(0.0, 0.15))
        process.kill()
        process.join(30)
        try:
            while pipe.poll(0):
                saved = pipe.recv()
        except EOFError:
            pass
        state = blank_state()
        found = Checkpointer(tmp_path).load(state)
        assert found is not None
        assert found.step >= saved
        assert holds_step(state, found.step)


def test_killed_between_any_two_steps_of_a_save(tmp_path: Path) -> None:
    before = tmp_path / "before"
    for step in (1, 2):
        Checkpointer(before).save(step, make_state(step))
    newest = []
    for instant in range(200):
        folder = tmp_path / str(instant)
        shutil.copytree(before, folder)
        process = CONTEXT.Process(target=save_once_and_die_at, args=(folder, 3, instant))
        process.start()
        process.join(30)
        state = blank_state()
        found = Checkpointer(folder).load(state)
        assert found is not None, instant
        assert holds_step(state, found.step), instant
        assert all(path.name.startswith((".", "step-")) for path in folder.iterdir())
        newest.append(found.step)
        Checkpointer(folder, keep_last=2).save(4, make_state(4))
        names = sorted(path.name for path in folder.iterdir())
        assert names == [f"step-0000000{found.step}", "step-00000004"], instant  # no half is left of anything
        shutil.rmtree(folder)
        if process.exitcode == 0:
            break
    assert newest == sorted(newest)  # published at one instant
    assert newest[0] == 2
    assert newest[-1] == 3
    assert newest.count(2) > 10
    assert newest.count(3) > 5
