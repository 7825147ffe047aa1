"""Attention of few query rows: dot products straight from the pages, V keys at a time, V being the vector length."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from tvm import tirx
from tvm.tirx.script import builder as T  # noqa: N812

from .attention_parts import LOWEST, Segment
from .vector import (
    Buffer,
    Expr,
    LaneSums,
    Register,
    bind,
    ceildiv,
    exp,
    i64,
    largest_divisor,
    load,
    reduce_max,
    reduce_sum,
    splat,
    store,
)

SCORE_BLOCK = 64  # keys scored at a time
AHEAD = 64  # keys between the one that is read and the one that is prefetched
QUAD = 4  # keys whose products with q stay in registers together


class Decode:
    """Some query heads of one kv head, for one token. scores and weights: (heads, SCORE_BLOCK); outputs: (heads, D)."""

    def __init__(self, segment: Segment, token: Expr, first_head: Expr) -> None:
        self.segment, self.shape, self.cache = segment, segment.shape, segment.cache
        self.token, self.first_head = token, first_head
        self.first, self.end = segment.key_range(segment.first_visible(token), token)
        self.heads = range(self.shape.heads)

    def attend(self) -> None:
        lanes = self.shape.lanes
        scores = T.alloc_buffer((i64(len(self.heads)), i64(SCORE_BLOCK)), "float32")
        outputs = T.alloc_buffer((i64(len(self.heads)), i64(self.shape.head_dim)), "float32")
        tops = [Register(T.float32(LOWEST)) for _ in self.heads]
        totals = [Register(T.float32(0.0)) for _ in self.heads]
        with T.serial(i64(self.shape.vectors)) as v:
            for h in self.heads:
                store(outputs, splat(0.0, lanes), h, v * lanes)
        with T.If(self.first < self.end), T.Then():
            aligned = bind(self.first // lanes * lanes)
            with T.serial(ceildiv(self.end - aligned, SCORE_BLOCK)) as block:
                start = bind(aligned + block * SCORE_BLOCK)
                stop = bind(tirx.min(start + SCORE_BLOCK, self.end))
                block_tops = self._score(scores, start, stop)
                with T.If(tirx.And(self.segment.is_in_tree(self.token), stop > self.segment.base)), T.Then():
                    self._hide_other_branches(scores, start, stop, block_tops)
                shrinks = [
                    self._exponentiate(scores, h, start, stop, block_tops[h], tops[h], totals[h]) for h in self.heads
                ]
                self._add_values(scores, outputs, shrinks, start, stop)
        for h in self.heads:
            row = partial(load, outputs, h)
            self.segment.output.write(
                self.segment.split, self.token, self.first_head + h, tops[h].get(), totals[h].get(), row
            )

    def _score(self, scores: Buffer, start: Expr, stop: Expr) -> list[Register]:
        """scores[h, i] = scale * q[h] . key[start + i], LOWEST outside the range; returns the maxima per lane."""
        lanes = self.shape.lanes
        tops = [Register(splat(LOWEST, lanes)) for _ in self.heads]
        quads = T.alloc_buffer((i64(len(self.heads) * lanes // QUAD), i64(lanes)), "float32")
        with T.serial(ceildiv(stop - start, lanes)) as block:
            first = bind(start + block * lanes)
            with T.serial(i64(lanes // QUAD)) as quad:
                self._score_quad(quads, bind(first + quad * QUAD), stop, quad)
            valid = self._valid(first, stop)
            for h in self.heads:
                dots = LaneSums(merged=QUAD)
                for quad in range(lanes // QUAD):
                    dots.add(bind(load(quads, h * (lanes // QUAD) + quad, 0, lanes=lanes)))
                score = bind(T.Select(valid, dots.result() * splat(self.shape.scale, lanes), splat(LOWEST, lanes)))
                tops[h].set(tirx.max(tops[h].get(), score))
                store(scores, score, h, block * lanes)
        return tops

    def _score_quad(self, quads: Buffer, first: Expr, stop: Expr, quad: Expr) -> None:
        """For each head four keys' products with q, partly summed; few enough sums at a time for the registers."""
        lanes, segment = self.shape.lanes, self.segment
        for cell in self._cells_ahead(first, QUAD):
            self.cache.prefetch(cell)
        cells = self.cache.keys(segment.seq, segment.head, first, stop, QUAD)
        dots = [[Register(splat(0.0, lanes)) for _ in cells] for _ in self.heads]
        unroll = largest_divisor(self.shape.vectors, 5)
        with T.serial(i64(self.shape.vectors // unroll)) as chunk:
            for v in range(unroll):
                at = (chunk * unroll + v) * lanes
                keys = [self.cache.load(cell + at) for cell in cells]
                for h, registers in enumerate(dots):
                    query = bind(load(segment.q, self.token, self.first_head + h, at, lanes=lanes))
                    for dot, key in zip(registers, keys, strict=True):
                        dot.set(dot.get() + query * key)
        for h, registers in enumerate(dots):
            sums = LaneSums()
            for dot in registers:
                sums.add(bind(dot.get()))
            store(quads, sums.result(), h * (lanes // QUAD) + quad, 0)

    def _cells_ahead(self, position: Expr, count: int) -> list[Expr]:
        """Cells of the `count` keys that come AHEAD keys after `position`, in the following segment after this one."""
        segment, following = self.segment, self.segment.following
        ahead = bind(position + AHEAD)
        inside = ahead < self.end
        beyond = following.first_key + (ahead - self.end) // count * count
        key = bind(T.Select(inside, ahead, tirx.max(beyond, i64(0))))
        seq = bind(T.Select(inside, segment.seq, following.seq))
        head = bind(T.Select(inside, segment.head, following.head))
        end = bind(T.Select(inside, self.end, following.end))
        return self.cache.keys(seq, head, key, end, count)

    def _valid(self, first: Expr, stop: Expr) -> Expr:
        lanes = self.shape.lanes
        key = T.ramp(T.cast(first, "int32"), T.int32(1), lanes)
        inside = key < splat(T.cast(stop, "int32"), lanes)
        return tirx.And(inside, key >= splat(T.cast(self.first, "int32"), lanes)) if self.shape.window else inside

    def _hide_other_branches(self, scores: Buffer, start: Expr, stop: Expr, tops: list[Register]) -> None:
        """LOWEST for keys that are not in the token's mask, and the maxima again."""
        lanes, branch = self.shape.lanes, self.segment.branch(self.token)
        for top in tops:
            top.set(splat(LOWEST, lanes))
        with T.serial(ceildiv(stop - start, lanes)) as block:
            seen = bind(self.segment.on_branch(branch, start + block * lanes))
            for h, top in enumerate(tops):
                score = load(scores, h, block * lanes, lanes=lanes)
                score = bind(T.Select(seen, score, splat(LOWEST, lanes)))
                top.set(tirx.max(top.get(), score))
                store(scores, score, h, block * lanes)

    def _exponentiate(
        self, scores: Buffer, h: int, start: Expr, stop: Expr, block_tops: Register, top: Register, total: Register
    ) -> Expr:
        """scores -> weights exp(score - top); returns the factor by which earlier sums shrink."""
        lanes = self.shape.lanes
        new_top = bind(tirx.max(top.get(), reduce_max(block_tops.get())))
        shrink = exp(self.shape.isa, top.get() - new_top)
        sums = Register(splat(0.0, lanes))
        with T.serial(ceildiv(stop - start, lanes)) as block:
            score = bind(load(scores, h, block * lanes, lanes=lanes))
            weight = exp(self.shape.isa, score - splat(new_top, lanes))
            weight = bind(T.Select(score > splat(LOWEST, lanes), weight, splat(0.0, lanes)))
            store(scores, weight, h, block * lanes)
            sums.set(sums.get() + weight)
        total.set(total.get() * shrink + reduce_sum(sums.get()))
        top.set(new_top)
        return shrink

    def _add_values(self, weights: Buffer, outputs: Buffer, shrinks: list[Expr], start: Expr, stop: Expr) -> None:
        """outputs[h] = outputs[h] * shrink[h] + sum of weights[h, i] * value[start + i].

        Where the outputs do not fit in registers, some columns at a time, for one run of keys after the other: values
        are then read from memory in their order.
        """
        lanes = self.shape.lanes
        vectors = largest_divisor(self.shape.vectors, max(1, self.shape.isa.registers * 3 // 4 // len(self.heads)))
        with T.serial(i64(self.shape.vectors)) as v:
            for h, shrink in enumerate(shrinks):
                store(outputs, load(outputs, h, v * lanes, lanes=lanes) * splat(shrink, lanes), h, v * lanes)
        runs = ceildiv(stop - start, self.cache.run)
        if vectors == self.shape.vectors:
            with self._accumulate(outputs, [i64(v * lanes) for v in range(vectors)]) as sums, T.serial(runs) as run:
                self._add_run(weights, sums, start, stop, run)
            return
        with T.serial(runs) as run, T.serial(i64(self.shape.vectors // vectors)) as chunk:
            columns = [bind((chunk * vectors + v) * lanes) for v in range(vectors)]
            with self._accumulate(outputs, columns) as sums:
                self._add_run(weights, sums, start, stop, run)

    @contextmanager
    def _accumulate(self, outputs: Buffer, columns: list[Expr]) -> Iterator[list[tuple[Expr, list[Register]]]]:
        """(column, one register for each head) for each of the columns: read before, stored after."""
        lanes = self.shape.lanes
        sums = [(column, [Register(load(outputs, h, column, lanes=lanes)) for h in self.heads]) for column in columns]
        yield sums
        for column, registers in sums:
            for h, register in zip(self.heads, registers, strict=True):
                store(outputs, register.get(), h, column)

    def _add_run(
        self, weights: Buffer, sums: list[tuple[Expr, list[Register]]], start: Expr, stop: Expr, run: Expr
    ) -> None:
        lanes, length = self.shape.lanes, self.cache.run
        first = bind(start + run * length)
        cell = bind(self.cache.key(self.segment.seq, self.segment.head, first) + self.cache.to_values)
        ahead = bind(self._cells_ahead(first, length)[0] + self.cache.to_values)
        skip = bind(tirx.max(self.first - first, i64(0)))
        with T.serial(skip, tirx.max(tirx.min(stop - first, i64(length)), skip)) as i:
            self.cache.prefetch(ahead + i * self.shape.head_dim)
            weight = [bind(splat(load(weights, h, run * length + i), lanes)) for h in self.heads]
            for column, registers in sums:
                value = self.cache.load(cell + i * self.shape.head_dim + column)
                for h, register in zip(self.heads, registers, strict=True):
                    register.set(register.get() + weight[h] * value)
