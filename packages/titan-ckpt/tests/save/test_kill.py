import random
import shutil
from pathlib import Path

import pytest

from ckpt_victim import (
    PHASES,
    Victims,
    blank,
    holds,
    kill_at_random,
    save_and_die,
    save_once_and_die_at,
    save_until_killed,
    state_of,
)
from titan_ckpt import Checkpointer, list_checkpoints

# How many kills at random instants: 200 and more in all, under ten minutes on two cores.
SOME = {1: 16, 2: 10}
MANY = {1: 60, 2: 30, 3: 10, 4: 10}


def check_and_return_step(folder: Path) -> int:
    """Whatever happened, the newest valid checkpoint is complete."""
    state = blank()
    found = Checkpointer(folder).load(state, required=True)
    assert found is not None
    assert holds(state, found.step)
    return found.step


def killed_at_random(folder: Path, scratch: Path, world: int, asynchronous: bool, kills: int) -> None:
    delays = random.Random(7 * world + asynchronous)
    saved = 0
    for kill in range(kills):
        victims = Victims(world, scratch, save_until_killed, folder, asynchronous)
        words = victims.progress(timeout=60)
        assert words, "no step was saved"
        everyone = kill_at_random(victims, delays, 0.15)
        codes, last_words = victims.end()
        assert None not in codes, f"kill {kill}: a rank hangs: {codes}"
        if not everyone:
            assert sorted(codes) == [-9] + [3] * (world - 1), f"kill {kill}: {codes}"
        saved = max([saved, *words, *last_words])
        assert check_and_return_step(folder) >= saved, f"kill {kill}"


@pytest.mark.parametrize(("world", "asynchronous", "kills"), [(1, True, 3)])
def test_killed_at_random_instants(tmp_path: Path, world: int, asynchronous: bool, kills: int) -> None:
    """What `save` said was saved is there, bit for bit, whenever the process was killed."""
    killed_at_random(tmp_path / "checkpoints", tmp_path, world, asynchronous, kills)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    ("world", "kills"),
    [
        *(pytest.param(*case, marks=pytest.mark.slow) for case in SOME.items()),
        *(pytest.param(*case, marks=pytest.mark.nightly) for case in MANY.items()),
    ],
)
def test_killed_at_many_random_instants(tmp_path: Path, world: int, kills: int, asynchronous: bool) -> None:
    killed_at_random(tmp_path / "checkpoints", tmp_path, world, asynchronous, kills)


def dies_at(folder: Path, scratch: Path, world: int, phase: str, after: bool, rank: int, asynchronous: bool) -> None:
    """From steps 1 and 2, save step 3: it is there or not, but 2 is, and the next job resumes."""
    ckpt = Checkpointer(folder)
    for step in (1, 2):
        ckpt.save(step, state_of(step))
    ckpt.close()
    victims = Victims(world, scratch, save_and_die, folder, 3, phase, after, rank, asynchronous)
    codes, _ = victims.end()
    assert codes[rank] == -9, codes
    assert None not in codes, f"a rank hangs: {codes}"
    newest = check_and_return_step(folder)
    published = (after and phase in ("publishing", "renaming", "all")) or phase in ("pointing", "removing", "clearing")
    assert newest == (3 if published else 2)
    ckpt = Checkpointer(folder, keep_last=2)  # the dead job does not block this one
    ckpt.load(blank())
    ckpt.save(4, state_of(4))
    ckpt.close()
    assert [info.step for info in list_checkpoints(folder)] == [newest, 4]
    assert {path.name for path in folder.iterdir()} == {f"step-{newest:08d}", "step-00000004", "latest"}


def phases_of(rank: int) -> list[str]:
    """Rank 0 alone goes through those that change names."""
    return [phase for phase in PHASES if rank == 0 or phase in ("collecting", "opening a file", "writing", "syncing")]


# What comes just after a phase is mostly what comes before the next; the slow set has them all.
@pytest.mark.parametrize(
    ("phase", "after"), [*((phase, False) for phase in PHASES), ("renaming", True), ("removing", True), ("all", True)]
)
def test_killed_at_each_phase(tmp_path: Path, phase: str, after: bool) -> None:
    dies_at(tmp_path / "checkpoints", tmp_path, 1, phase, after, 0, False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "asynchronous"),
    [
        (1, False),
        (2, True),
        *(pytest.param(*case, marks=pytest.mark.nightly) for case in ((1, True), (2, False), (4, False), (4, True))),
    ],
)
def test_killed_at_each_phase_among_ranks(tmp_path: Path, world: int, asynchronous: bool) -> None:
    for rank in {0, world - 1}:
        for phase in phases_of(rank):
            # What comes just after a phase is mostly what comes before the next: two ranks have both.
            for after in (False, True) if world == 2 else (False,):
                case = tmp_path / f"{rank}-{phase}-{after}"
                case.mkdir()
                dies_at(case / "checkpoints", case, world, phase, after, rank, asynchronous)


@pytest.mark.slow
def test_killed_between_any_two_steps_of_a_save(tmp_path: Path) -> None:
    before = tmp_path / "before"
    ckpt = Checkpointer(before)
    for step in (1, 2):
        ckpt.save(step, state_of(step))
    ckpt.close()
    newest = []
    for instant in range(300):
        folder = tmp_path / str(instant)
        shutil.copytree(before, folder)
        (code,), _ = Victims(1, tmp_path, save_once_and_die_at, folder, 3, instant).end()
        newest.append(check_and_return_step(folder))
        assert all(path.name.startswith((".", "step-", "latest")) for path in folder.iterdir())
        ckpt = Checkpointer(folder, keep_last=2)
        ckpt.load(blank())
        ckpt.save(4, state_of(4))
        ckpt.close()
        names = sorted(path.name for path in folder.iterdir())
        assert names == ["latest", f"step-0000000{newest[-1]}", "step-00000004"], instant  # no half is left of anything
        shutil.rmtree(folder)
        if code == 0:
            break
    assert newest == sorted(newest)  # published at one instant
    assert newest[0] == 2
    assert newest[-1] == 3
    assert newest.count(2) > 10
    assert newest.count(3) > 5
