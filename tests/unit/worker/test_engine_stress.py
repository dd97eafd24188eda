"""Random plans, KV operations in any order, copies that end late, sidecars that die, streams that
break: no block has two owners, none is used while a copy is under way, and every job gives the
tokens that it gives when nothing disturbs it."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from fastserve.worker.job import OpKind, OpStatus
from unit.worker.engine_rig import Rig

BLOCKS = 14
HOST_BLOCKS = 24
STEPS = 400
MOVES = [OpKind.OFFLOAD, OpKind.UPLOAD, OpKind.DROP_DEVICE, OpKind.DROP_HOST, OpKind.COPY_OUT]
MOVE_WEIGHTS = [4, 5, 2, 1, 6]


class Disturber:
    """Does what a scheduler may do; rows only for jobs whose operations have ended, but for copies
    of full blocks, beside which a job may run.

    sharing: many jobs begin alike and have the same salt. caches: the host keeps what they share.
    """

    def __init__(self, seed: int, *, sharing: bool, caches: bool = False) -> None:
        self.random = random.Random(seed)
        self.sharing = sharing
        self.rig = Rig(blocks=BLOCKS, capacity=HOST_BLOCKS, caches=caches)
        self.moving: dict[int, tuple[OpKind, int]] = {}  # by op id: what, and the handle
        self.live: list[int] = []
        self.happened: Counter[str] = Counter()
        self.rig.model.beside = self.beside

    def run(self) -> None:
        actions = {
            self.submit: 3,
            self.iterate: 12,
            self.iterate_again: 12,
            self.move: 8,
            self.end_a_copy: 12,
            self.release: 1,
            self.sidecar_dies: 0.3,
            self.stream_breaks: 0.5,
        }
        for _ in range(STEPS):
            (action,) = self.random.choices(list(actions), list(actions.values()))
            action()
            self.hear()
            self.rig.check_blocks()
            assert not self.rig.failed
        self.finish()

    def hear(self) -> None:
        """Note which operations ended."""
        if not self.rig.engine.runnable:
            self.rig.idle()
        for number in [number for number in self.moving if number in self.rig.ended]:
            self.happened[self.rig.ended[number].status.name] += 1
            if self.moving[number][0] is OpKind.COPY_OUT and self.rig.ended[number].bytes:
                self.happened["COPY_OUT"] += 1
            del self.moving[number]

    def some(self, share: float) -> list[int]:
        return [handle for handle in self.live if self.random.random() < share]

    # --- actions -----------------------------------------------------------------------------

    def submit(self) -> None:
        if len(self.live) < 5:
            length = self.random.choice([1, 2, 3, 4, 5, 8, 13])
            prompt = [self.random.randrange(60) for _ in range(length)]
            salt = b""
            if self.sharing:
                salt = self.random.choice([b"", b"a", b"a", b"a", b"b"])
                prompt[:-1] = range(length - 1)
            most = self.random.randint(1, 30)
            self.live.append(self.rig.job(prompt, max_tokens=most, salt=salt))
            self.rig.plan()

    def iterate(self) -> None:
        moving = {handle for kind, handle in self.moving.values() if kind is not OpKind.COPY_OUT}
        beside = {handle for _, handle in self.moving.values()} - moving
        rows = {
            handle: self.random.randint(1, 8) for handle in self.some(0.7) if handle not in moving
        }
        self.happened["beside"] += len(beside & set(rows))
        self.rig.plan(rows, lease=self.random.randint(1, 5))
        self.iterate_again()

    def iterate_again(self) -> None:
        if self.rig.engine.runnable:
            done = self.rig.step()
            self.happened["stalled"] += len(done.stalled)
            self.happened["cached"] += sum(device > 0 for _, _, device, _ in done.lookups)
            self.happened["from host"] += sum(host > 0 for _, _, _, host in done.lookups)

    def move(self) -> None:
        count = self.random.choice([1, 1, 2, 3])
        handles = self.random.choices(self.live, k=count) if self.live else []
        kinds = self.random.choices(MOVES, MOVE_WEIGHTS, k=len(handles))
        ops = list(zip(kinds, handles, strict=True))
        numbers = self.rig.plan(ops=[(*op, self.random.randint(1, 3)) for op in ops])
        self.moving.update(zip(numbers, ops, strict=True))

    def beside(self) -> None:
        """While the model computes: copies end, and a plan comes."""
        rig = self.rig
        if self.random.random() < 0.3:
            self.end_a_copy()
        if self.random.random() < 0.2:
            handles = self.random.choices(self.live, k=self.random.choice([0, 1, 1, 2]))
            kinds = self.random.choices(MOVES, MOVE_WEIGHTS, k=len(handles))
            ops = list(zip(kinds, handles, strict=True))
            moving = {handle for _, handle in self.moving.values()} | set(handles)
            rows = [handle for handle in self.some(0.7) if handle not in moving]
            numbers, begun = rig.plan_beside(rows, [(*op, self.random.randint(1, 3)) for op in ops])
            self.moving.update(zip(numbers, ops, strict=True))
            self.happened["begun beside"] += begun
            self.happened["to wait"] += begun < len(ops)
            self.happened["behind a plan"] += len(rig.coming) > 1 and begun > 0
        rig.idle()
        rig.check_blocks()

    def end_a_copy(self) -> None:
        if self.rig.mover.under_way:
            self.rig.mover.end(self.random.randrange(len(self.rig.mover.under_way)))

    def release(self) -> None:
        if self.live:
            handle = self.live.pop(self.random.randrange(len(self.live)))
            self.moving[self.rig.op(OpKind.RELEASE, handle)] = (OpKind.RELEASE, handle)

    def sidecar_dies(self) -> None:
        self.rig.mover.die()

    def stream_breaks(self) -> None:
        """The worker waits for its copies; the next scheduler may have heard fewer tokens."""
        rig = self.rig
        rig.engine.detach()
        rig.mover.end_all()
        self.hear()
        held = rig.engine.reset(rig.plan_id, rig.mover.inventory)
        self.moving.clear()
        assert {job: host for job, (_, host) in held.items() if host} == rig.mover.inventory
        assert set(held) <= {rig.jobs[handle].job_id for handle in self.live}
        lost = self.random.choice([0, 0, 1, 2, 5])
        for handle in self.live:
            # One that had ended is live again only if its last token was not heard.
            most = min(len(rig.output[handle]), rig.jobs[handle].params.max_tokens - 1)
            rig.resend(handle, known=max(0, most - lost))
        rig.plan()

    def finish(self) -> None:
        """Every job that is left ends, with the right tokens; then nothing is held."""
        rig = self.rig
        rig.model.beside = lambda: None
        rig.engine.detach()
        rig.mover.end_all()
        self.hear()
        assert not self.moving
        for handle in self.live:
            for other in self.live:
                assert rig.do(OpKind.DROP_DEVICE, other).status is OpStatus.OK
            rig.do(OpKind.UPLOAD, handle)
            rig.plan([handle])  # its beginning may come from the host
            rig.mover.end_all()
            rig.step()
            rig.run([handle], 60)
            assert rig.finished[handle] == "length"
            assert len(rig.output[handle]) == rig.jobs[handle].params.max_tokens
        rig.check_output()
        for handle in self.live:
            rig.do(OpKind.RELEASE, handle)
        assert rig.engine.pool.free == BLOCKS
        self.happened["kept"] += rig.engine.pool.kept
        assert not rig.engine._held and not rig.engine._by_handle and not rig.mover.host


@pytest.mark.parametrize("sharing", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_disturbed_jobs_give_the_undisturbed_tokens(seed: int, sharing: bool) -> None:
    Disturber(seed, sharing=sharing).run()


@pytest.mark.parametrize("seed", range(6))
def test_jobs_that_share_through_the_host_give_the_undisturbed_tokens(seed: int) -> None:
    Disturber(seed, sharing=True, caches=True).run()


def test_the_disturbances_do_happen() -> None:
    """A test of the test: everything that is to be survived occurs."""
    happened: Counter[str] = Counter()
    for seed in range(10):
        disturber = Disturber(seed, sharing=True, caches=True)
        disturber.run()
        happened += disturber.happened
    expected = {"OK", "LOST", "NO_HOST_SPACE", "NO_DEVICE_SPACE", "stalled", "COPY_OUT", "beside"}
    expected |= {"cached", "kept", "from host", "begun beside", "to wait", "behind a plan"}
    assert expected <= set(+happened)
