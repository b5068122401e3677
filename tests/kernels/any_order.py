"""Runs Triton kernels, interpreted, as a GPU might: in any order, interleaved, watched for races.

The interpreter runs one program after the other, so it never shows what a launch leaves to chance.
Inside `any_order()` every launch can be run
    shuffled      programs one by one, in random order
    interleaved   programs as threads that hand over at random at every load, store and atomic
    watched       in the usual order, every address noted. A race is a place that one program
                  stores and another one loads or stores in the same launch, atomics among
                  themselves excepted; or that one program stores and then touches again without a
                  barrier between: on a GPU different warps may do these in any order.
In all of them an access outside of the tensors that the launch was given raises before it happens.
Leans on the interpreter of the installed Triton; knows nothing of the kernels.
"""

import inspect
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
import triton.language as tl
from triton.language import core
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, interpreter_builder

# Programs that run at the same time when they are interleaved.
AT_ONCE = 24
LOAD, STORE, ATOMIC = range(3)


@dataclass
class Order:
    """How launches run, and what was seen.

    Attributes:
        mode: "shuffled", "interleaved" or "watched".
        seed: of everything random.
        drop_barriers: whether barriers do nothing: a planted bug.
        races: a sentence per launch with a race.
        launches: names of the kernels that were launched.
    """

    mode: str = "watched"
    seed: int = 0
    drop_barriers: bool = False
    races: list[str] = field(default_factory=list)
    launches: set[str] = field(default_factory=set)


@contextmanager
def any_order() -> Iterator[Order]:
    """Launches inside run as the yielded order says."""
    order = Order()
    usual_call, usual_class = GridExecutor.__call__, type(interpreter_builder)
    usual_index = interpreter_builder.__dict__.pop("grid_idx", None)
    # vLLM's shared-memory module for CPUs, once imported, has put one there that does nothing.
    usual_barrier, tl.debug_barrier = tl.debug_barrier, core.debug_barrier
    GridExecutor.__call__ = lambda executor, *args, **kwargs: _launch(order, executor, args, kwargs)
    interpreter_builder.__class__ = _builder_class(usual_class, order)
    try:
        yield order
    finally:
        GridExecutor.__call__ = usual_call
        interpreter_builder.__class__ = usual_class
        interpreter_builder.grid_idx = usual_index
        tl.debug_barrier = usual_barrier


_program = threading.local()


class _Notes:
    """The accesses of one launch, and where it may go."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
        spans = sorted((start, start + s.nbytes()) for start, s in storages.items() if s.nbytes())
        self.starts, self.ends = np.array(spans, dtype=np.uint64).reshape(-1, 2).T
        self.barriers: dict[int, int] = {}
        self.accesses: list[tuple[int, int, int, np.ndarray]] = []

    def note(self, kind: int, places, mask) -> None:
        place = np.asarray(places.data, dtype=np.uint64).ravel()
        if mask is not None:
            place = place[np.broadcast_to(mask.data, places.data.shape).ravel().astype(bool)]
        width = np.uint64(places.get_element_ty().primitive_bitwidth // 8)
        span = np.searchsorted(self.starts, place, side="right") - 1
        if (span < 0).any() or (place + width > self.ends[np.maximum(span, 0)]).any():
            raise IndexError("an access outside of every tensor of the launch")
        me = _program.number
        self.accesses.append((kind, me, self.barriers.get(me, 0), place))

    def races(self) -> str:
        """Places touched in ways that have no order, counted; empty without any."""
        sizes = [len(place) for *_, place in self.accesses]
        columns = [
            np.repeat([access[i] for access in self.accesses], sizes).astype(np.int64)
            for i in range(3)
        ]
        columns += [np.repeat(np.arange(len(sizes)), sizes)]
        place = np.concatenate([place for *_, place in self.accesses] or [np.empty(0)])
        is_shared = np.isin(place, np.unique(place[columns[0] != LOAD]))
        place, columns = place[is_shared], [column[is_shared] for column in columns]
        by_place = np.lexsort((columns[3], columns[1], place))
        place, (kind, program, barrier, turn) = (
            place[by_place],
            (column[by_place] for column in columns),
        )
        same_place = place[1:] == place[:-1]
        same_program = same_place & (program[1:] == program[:-1])
        only_atomics = np.ones(len(place), dtype=bool)
        for start, stop in _runs(place):
            only_atomics[start:stop] = (kind[start:stop] == ATOMIC).all()
        between = same_place & ~same_program & ~only_atomics[1:]
        one_stores = (kind[1:] == STORE) | (kind[:-1] == STORE)
        no_barrier = (barrier[1:] == barrier[:-1]) & (turn[1:] != turn[:-1])
        within = same_program & one_stores & no_barrier
        found = {"between programs": between.sum(), "within a program": within.sum()}
        return ", ".join(f"{count} {where}" for where, count in found.items() if count)


def _runs(place: np.ndarray) -> Iterator[tuple[int, int]]:
    """Bounds of equal neighbours."""
    bounds = np.flatnonzero(np.r_[True, place[1:] != place[:-1], True])
    return pairwise(bounds)


class _Baton:
    """Lets one thread run at a time; who is next is drawn at random."""

    def __init__(self, count: int, rng: random.Random) -> None:
        self.rng = rng
        self.changed = threading.Condition()
        self.alive = list(range(count))
        self.turn = rng.choice(self.alive)

    def wait(self, me: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.turn == me)

    def hand_over(self, me: int, *, leaves: bool = False) -> None:
        with self.changed:
            if leaves:
                self.alive.remove(me)
            self.turn = self.rng.choice(self.alive) if self.alive else None
            self.changed.notify_all()
        if not leaves:
            self.wait(me)


def _builder_class(usual: type, order: Order) -> type:
    """The interpreter's memory operations, which also tell the launch in progress."""

    def touch(kind: int, places, mask) -> None:
        if (baton := getattr(_program, "baton", None)) is not None:
            baton.hand_over(_program.me)
        _program.notes.note(kind, places, mask)

    class Builder(usual):
        grid_idx = property(
            lambda self: getattr(_program, "index", None),
            lambda self, index: setattr(_program, "index", index),
        )

        def create_masked_load(self, places, mask, *rest):
            touch(LOAD, places, mask)
            return super().create_masked_load(places, mask, *rest)

        def create_masked_store(self, places, value, mask, *rest):
            touch(STORE, places, mask)
            return super().create_masked_store(places, value, mask, *rest)

        def create_atomic_rmw(self, operation, places, value, mask, *rest):
            touch(ATOMIC, places, mask)
            return super().create_atomic_rmw(operation, places, value, mask, *rest)

        def create_barrier(self):
            if not order.drop_barriers:
                barriers, me = _program.notes.barriers, _program.number
                barriers[me] = barriers.get(me, 0) + 1

    return Builder


def _launch(order: Order, executor: GridExecutor, args: tuple, kwargs: dict) -> None:
    """`GridExecutor.__call__` for tensors on a CPU, with the programs in the order's order."""
    known = inspect.getfullargspec(executor.fn).args
    kwargs = {name: value for name, value in kwargs.items() if name in known}
    scope = interpreter._patch_lang(executor.fn)
    try:
        bound = inspect.getcallargs(executor.fn, *args, **kwargs)
        tensors = [value for value in bound.values() if isinstance(value, torch.Tensor)]
        bound = {
            name: value if name in executor.constexprs else interpreter._implicit_cvt(value)
            for name, value in bound.items()
        }
        grid = tuple(executor.grid) + (1,) * (3 - len(executor.grid))
        interpreter_builder.set_grid_dim(*grid)
        programs = [(i, index) for i, index in enumerate(np.ndindex(*grid))]
        notes, rng = _Notes(tensors), random.Random(order.seed)

        def run(number: int, index: tuple[int, ...]) -> None:
            _program.number, _program.notes = number, notes
            interpreter_builder.set_grid_idx(*index)
            executor.fn(**bound)

        if order.mode != "watched":
            rng.shuffle(programs)
        if order.mode == "interleaved":
            for first in range(0, len(programs), AT_ONCE):
                _interleave(programs[first : first + AT_ONCE], run, rng)
        else:
            for program in programs:
                run(*program)
    finally:
        scope.restore()
    order.launches.add(executor.fn.__name__)
    if order.mode == "watched" and (found := notes.races()):
        order.races.append(f"{executor.fn.__name__}: {found}")


def _interleave(programs, run, rng: random.Random) -> None:
    baton, errors = _Baton(len(programs), rng), []

    def work(me: int) -> None:
        _program.baton, _program.me = baton, me
        baton.wait(me)
        try:
            run(*programs[me])
        except Exception as error:
            errors.append(error)
        finally:
            baton.hand_over(me, leaves=True)

    threads = [threading.Thread(target=work, args=(me,)) for me in range(len(programs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
