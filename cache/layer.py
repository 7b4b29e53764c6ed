"""What one layer's cascade holds: tokens look at it, and are committed to it."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kvcascade.cache.basis import Bases, attend_in
from kvcascade.cache.cascade import Cascade
from kvcascade.cache.checks import promise
from kvcascade.cache.codec import f32
from kvcascade.cache.errors import BadInput
from kvcascade.cache.hints import Hints
from kvcascade.cache.policies import Full
from kvcascade.cache.retention import Hint
from kvcascade.cache.statistic import Memory, Statistic, Tokens
from kvcascade.cache.tier import empty, take_in
from kvcascade.kernels.causal import causal_attention
from kvcascade.kernels.decode import decode
from kvcascade.kernels.heads import Heads
from kvcascade.kernels.partial import Partial, Weights, attend_each, joined, normalise
from kvcascade.kernels.prefill import observed_attention
from kvcascade.kernels.slots import Codecs, Entry, Held, Slots
from kvcascade.kernels.write import exchange


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["out_BTNW", "q_BTNH", "positions_BT", "entry", "written_BTK", "mass"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Look:
    """What tokens saw that looked at a cache and are not in it yet."""

    out_BTNW: Float[Array, "B _ N W"]
    """The attention of the last look's queries."""
    q_BTNH: Float[Array, "B T N H"]
    positions_BT: Int[Array, "B T"]
    entry: Entry
    """They carry no numbers yet: those are made of the tokens that enter."""
    written_BTK: Float[Array, "B T K"] | None
    """None where no token carries numbers: to make it is a product as large as the output's."""
    mass: tuple[Float[Array, "B K T _"], ...]
    """What each query gave each slot of each tier, and then each of the tokens; nothing where nobody asks for it."""

    def accept(self, accepted_BT: Bool[Array, "B T"]) -> "Look":
        """The same look with those tokens that are rejected turned into padding: nothing of them will be left."""
        pos_BKT = jnp.where(accepted_BT[:, None], self.entry.pos_BKT, -1)
        entry = dataclasses.replace(self.entry, pos_BKT=pos_BKT)
        return dataclasses.replace(self, positions_BT=jnp.where(accepted_BT, self.positions_BT, -1), entry=entry)

    def then(self, later: "Look") -> "Look":
        """This look and a later one, whose queries also saw the tokens of this one, as one look."""
        join = lambda a, b, axis=2: jnp.concatenate([a, b], axis)
        mass = ()
        if later.mass:
            (*held, ours), (*held_later, ours_later, own) = self.mass, later.mass
            # Of the later tokens the first queries saw nothing.
            ours = jnp.pad(ours, ((0, 0), (0, 0), (0, 0), (0, own.shape[3])))
            mass = (*map(join, held, held_later), join(ours, join(ours_later, own, 3)))
        entry = jax.tree.map(join, self.entry, later.entry)
        q_BTNH, positions_BT = join(self.q_BTNH, later.q_BTNH, 1), join(self.positions_BT, later.positions_BT, 1)
        both = self.written_BTK, later.written_BTK
        written_BTK = None if both[0] is None or both[1] is None else join(*both, 1)
        return Look(later.out_BTNW, q_BTNH, positions_BT, entry, written_BTK, mass)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["slots", "memories", "bases"],
    meta_fields=["cascade", "heads", "context", "prompting"],
)
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """One layer's tiers and what it remembers beside them."""

    cascade: Cascade
    heads: Heads
    context: int
    """The number of positions that it was made for: a full tier has room for no more."""
    slots: tuple[Slots, ...]
    memories: tuple[Any, ...]
    bases: tuple[Bases | None, ...] = ()
    """Of each tier; they are a model's, whatever the rows. (): none is in a basis of its own."""
    prompting: bool = False
    """Whether there are tiers in front, and calls of many tokens are a prompt's, which goes past them."""

    @classmethod
    def empty(
        cls,
        cascade: Cascade,
        batch: int,
        heads: Heads,
        context: int,
        ids: tuple[int, ...] | None = None,
        bases: tuple[Bases | None, ...] = (),
    ) -> "LayerCache":
        """Tiers that hold nothing, for rows of up to `context` tokens; `ids` are the KV heads' numbers among those of all layers.

        Raises BadInput if a codec cannot store vectors of these heads.
        """
        cascade.nbytes(context, heads)
        numbers = [len(cascade.numbers(index)) for index in range(len(cascade.tiers))]
        tiers = zip(cascade.tiers, numbers, strict=True)
        slots = tuple(empty(tier, batch, heads, context, count) for tier, count in tiers)
        memories = tuple(each.init(batch, heads, ids or range(heads.kv)) for each in cascade.memories)
        if any(codec.basis for tier in cascade.tiers for codec in tier.codecs) and not any(bases):
            raise ValueError(f"{cascade} has codecs in a model's bases, and none are given")
        if heads.soft_cap and any(each and each.k.shift_KH is not None for each in bases):
            raise BadInput(f"{cascade}: keys are stored less their mean, which the logits' soft cap does not allow")
        return cls(cascade, heads, context, slots, memories, bases, prompting=cascade.front > 0)

    def step(
        self,
        q_BTNH: Float[Array, "B T N H"],
        k_BTKH: Float[Array, "B T K H"],
        v_BTKW: Float[Array, "B T K W"],
        positions_BT: Int[Array, "B T"],
        fresh: bool = False,
        written_BTK: Float[Array, "B T K"] | None = None,
        reread: dict[Statistic, Float[Array, "B K T"]] | None = None,
        beside: "Beside | None" = None,
    ) -> tuple[Float[Array, "B T N W"], "LayerCache"]:
        """Put this call's tokens into the cascade and attend from them; position -1 is padding.

        T > 1 (prefill) is `commit` after `look`: the tokens attend to what the cascade held and causally to each other, then enter all at
        once. T = 1 (decode): the token enters, then attends to what the cascade holds, itself in it as it is stored. So a cache of S slots
        is a cache of S tokens, as everywhere in the literature; to look first would let it see S + 1, which moves the reference figures.
        `fresh` says that the cascade holds nothing yet, and that each row is positions 0, 1, 2, … and then padding. `written` is what a
        value adds to the residual stream, as `Tokens` has it; by default the value itself is. `reread` has the numbers for which a fresh
        prompt was read a second time; ValueError where they are missing. With `beside` the queries see more than what the layer holds.
        """
        if positions_BT.shape[1] > 1 and (beside or not fresh):
            look = self.look(q_BTNH, k_BTKH, v_BTKW, positions_BT, written_BTK=written_BTK, beside=beside)
            return look.out_BTNW, self.commit(look)
        if positions_BT.shape[1] == 1:
            cache = self.entered(q_BTNH, k_BTKH, v_BTKW, positions_BT, written_BTK)
            if beside and not self.bases:
                found = beside(cache.held, self.cascade.observed)
            else:
                more = [beside([], False)] if beside else []
                found = joined([*more, cache.decoded(q_BTNH, positions_BT)])
            return cache.attended(found, q_BTNH, positions_BT)
        entry, written_BTK = self._entry(k_BTKH, v_BTKW, positions_BT, written_BTK)
        entry = self._begun(entry, q_BTNH, positions_BT, written_BTK)
        promise(lambda: jnp.all(jnp.asarray([(slots.pos_BKS < 0).all() for slots in self.slots])), NOT_EMPTY)
        index_T, length_B = jnp.arange(positions_BT.shape[1]), (positions_BT >= 0).sum(-1)
        promise(lambda: (positions_BT == jnp.where(index_T < length_B[:, None], index_T, -1)).all(), NOT_FROM_ZERO)
        lasts = dict.fromkeys(each.last for each in self.cascade.statistics if each.watches)
        found = [observed_attention(q_BTNH, k_BTKH, v_BTKW, length_B, self.heads, last) for last in lasts]
        mass = dict(zip(lasts, (each for _, each in found), strict=True))
        out_BTNW = found[0][0] if found else causal_attention(q_BTNH, k_BTKH, v_BTKW, self.heads)
        among = lambda each: each.among(mass[each.last], entry.pos_BKT)
        numbers = self._watched(self.cascade.statistics, entry.numbers, among, entry.pos_BKT, positions_BT)
        if missing := {*self.cascade.rereads} - {*(reread or {})}:
            raise ValueError(f"{missing} are of a prompt that is read twice, as gpt.first_step does")
        pairs = zip(self.cascade.statistics, numbers, strict=True)
        numbers = tuple(reread[each] if reread and each in reread else number for each, number in pairs)
        return out_BTNW, self._take(q_BTNH, dataclasses.replace(entry, numbers=numbers), positions_BT)

    def entered(
        self,
        q_BTNH: Float[Array, "B 1 N H"],
        k_BTKH: Float[Array, "B 1 K H"],
        v_BTKW: Float[Array, "B 1 K W"],
        positions_BT: Int[Array, "B 1"],
        written_BTK: Float[Array, "B 1 K"] | None = None,
    ) -> "LayerCache":
        """The first half of a decode step: a token of each row is in the cache, and has not attended yet."""
        entry, written_BTK = self._entry(k_BTKH, v_BTKW, positions_BT, written_BTK)
        entry = self._begun(entry, q_BTNH, positions_BT, written_BTK)
        return self._take(q_BTNH, entry, positions_BT)

    def decoded(
        self, q_BTNH: Float[Array, "B 1 N H"], positions_BT: Int[Array, "B 1"]
    ) -> tuple[Partial, list[Weights]]:
        """Attention of one query per row to what is held, not yet normalised; with the weights of slots, if some number depends on them."""
        observed = self.cascade.observed
        attend = lambda q, held: decode(q[:, 0], positions_BT[:, 0], held, self.heads, observed)
        return attend_in(self.bases, q_BTNH, self.held, self.heads, attend)

    def attended(
        self,
        found: tuple[Partial, list[Weights]],
        q_BTNH: Float[Array, "B 1 N H"],
        positions_BT: Int[Array, "B 1"],
    ) -> tuple[Float[Array, "B 1 N W"], "LayerCache"]:
        """The second half: what the tokens saw, and the cache with the numbers that attention changes."""
        out_BTNW, mass = normalise([found])
        return self._watch(mass, positions_BT)._before(out_BTNW.astype(q_BTNH.dtype))

    def look(
        self,
        q_BTNH: Float[Array, "B T N H"],
        k_BTKH: Float[Array, "B T K H"],
        v_BTKW: Float[Array, "B T K W"],
        positions_BT: Int[Array, "B T"],
        pending: Look | None = None,
        written_BTK: Float[Array, "B T K"] | None = None,
        beside: "Beside | None" = None,
    ) -> Look:
        """Attend to what is held, to the tokens of an earlier look that are pending, and causally to this call's own; write nothing.

        The result is for `commit`; with `pending` it has the tokens of both looks, with `beside` the queries see what that does as well.
        """
        entry, written_BTK = self._entry(k_BTKH, v_BTKW, positions_BT, written_BTK)
        offered = [entry] if pending is None else [pending.entry, entry]
        as_slots = lambda each: Slots(f32.encode(each.k), f32.encode(each.v), each.pos_BKT)
        held = [*self.held, *((as_slots(each), Codecs(f32, f32)) for each in offered)]
        attend = lambda q, some: joined(attend_each(q, positions_BT, some, self.heads, self.cascade.observed))
        found = attend_in(self.bases, q_BTNH, held, self.heads, attend)
        out_BTNW, mass = normalise([found, *([beside([], False)] if beside else [])])
        kept = written_BTK if self.cascade.statistics else None
        look = Look(out_BTNW.astype(q_BTNH.dtype), q_BTNH, positions_BT, entry, kept, tuple(mass))
        return look if pending is None else pending.then(look)

    def commit(self, look: Look) -> "LayerCache":
        """Take in the tokens of a look; those of position -1 are none, so a look of which nothing was accepted changes nothing."""
        positions_BT = look.positions_BT
        cache = self._watch(look.mass[:-1], positions_BT)
        entry = self._begun(look.entry, look.q_BTNH, positions_BT, look.written_BTK)
        pos_BKT = entry.pos_BKT
        counted = lambda each: each.among(_counted(look.mass[-1], positions_BT, each.last), pos_BKT)
        numbers = self._watched(self.cascade.statistics, entry.numbers, counted, pos_BKT, positions_BT)
        return cache._take(look.q_BTNH, dataclasses.replace(entry, numbers=numbers), positions_BT)

    @property
    def _here(self) -> Heads:
        """The heads, with RoPE as it is in a context of this length."""
        return dataclasses.replace(self.heads, rope=self.heads.rope and self.heads.rope.at(self.context))

    @property
    def held(self) -> list[Held]:
        """Every tier's slots, and how they are stored."""
        return [(slots, tier.codecs) for tier, slots in zip(self.cascade.tiers, self.slots, strict=True)]

    def _vectors(
        self, bases: tuple[Bases | None, ...]
    ) -> list[tuple[Float[Array, "B K S H"], Float[Array, "B K S W"]]]:
        """What the tiers hold, in the model's basis."""
        found = [(codecs.k.decode(slots.k), codecs.v.decode(slots.v)) for slots, codecs in self.held]
        pairs = zip(found, bases or (None,) * len(found), strict=True)
        return [(each.k.back(k), each.v.back(v)) if each else (k, v) for (k, v), each in pairs]

    @property
    def kept(self) -> int:
        """Tokens that a row has room for."""
        return sum(slots.pos_BKS.shape[2] for slots in self.slots)

    @property
    def tokens(self) -> int:
        """Tokens that it holds, in the row that holds most."""
        return int(jnp.stack([(slots.pos_BKS[:, 0] >= 0).sum(-1) for slots in self.slots]).sum(0).max())

    def _entry(self, k_BTKH, v_BTKW, positions_BT, written_BTK) -> tuple[Entry, Float[Array, "B T K"]]:
        """Tokens as they travel, without numbers, and what their values write.

        In float32 also from a bf16 model, since what a tier decodes on the way down must not be rounded again.
        """
        k, v = (x.astype(jnp.float32).transpose(0, 2, 1, 3) for x in (k_BTKH, v_BTKW))
        pos_BKT = jnp.broadcast_to(positions_BT[:, None], (*k.shape[:2], positions_BT.shape[1])).astype(jnp.int32)
        written_BTK = jnp.abs(v_BTKW.astype(jnp.float32)).sum(-1) if written_BTK is None else written_BTK
        return Entry(k, v, pos_BKT, ()), written_BTK

    def _begun(self, entry: Entry, q_BTNH, positions_BT, written_BTK) -> Entry:
        """The tokens with the numbers that they begin with, which may depend on the others that enter with them."""
        if written_BTK is None:  # there are no numbers
            return entry
        now_B11, written_BKT = positions_BT.max(-1)[:, None, None], written_BTK.transpose(0, 2, 1)
        beside = self._here, written_BKT, q_BTNH.astype(jnp.float32)
        tokens = Tokens(entry.pos_BKT, entry.k, entry.v, now_B11, (), *beside)
        begins = lambda each: each.enter(tokens._replace(memories=self._memories(each)))
        numbers = tuple(lax.stop_gradient(begins(each)).astype(jnp.float32) for each in self.cascade.statistics)
        return dataclasses.replace(entry, numbers=numbers)

    def _memories(self, statistic: Statistic) -> tuple[Any, ...]:
        return tuple(self._memory[each] for each in statistic.reads())

    @property
    def _memory(self) -> dict[Memory, Any]:
        return dict(zip(self.cascade.memories, self.memories, strict=True))

    @jax.named_scope("scores")
    def _watch(self, mass, positions_BQ) -> "LayerCache":
        """Let the numbers that depend on attention see how much of it each query gave each tier's slots."""
        if not mass:
            return self
        tiers = []
        for index, slots in enumerate(self.slots):
            counted = lambda each, index=index: _counted(mass[index], positions_BQ, each.last)
            kept = self.cascade.numbers(index)
            numbers = self._watched(kept, slots.numbers, counted, slots.pos_BKS, positions_BQ)
            tiers.append(dataclasses.replace(slots, numbers=numbers))
        return dataclasses.replace(self, slots=tuple(tiers))

    def _before(self, out_BTNW) -> tuple[Float[Array, "B T N W"], "LayerCache"]:
        """The output, which nobody has before the numbers are made that attention changes.

        Left to itself XLA makes the numbers of all layers at the end of a step, and holds all layers' weights until then.
        """
        if not self.cascade.observed:
            return out_BTNW, self
        out_BTNW, numbers = lax.optimization_barrier((out_BTNW, [slots.numbers for slots in self.slots]))
        slots = (dataclasses.replace(each, numbers=made) for each, made in zip(self.slots, numbers, strict=True))
        return out_BTNW, dataclasses.replace(self, slots=tuple(slots))

    def _watched(self, statistics, numbers, mass_of, pos_BKS, positions_BQ):
        """The numbers of tokens after attention; those of a row without a query stay as they are."""
        now_B11, new_B11 = (x[:, None, None] for x in (positions_BQ.max(-1), (positions_BQ >= 0).sum(-1)))

        def one(statistic, number):
            if not statistic.watches:
                return number
            new = statistic.watch(number, lax.stop_gradient(mass_of(statistic)), pos_BKS, now_B11, new_B11)
            return jnp.where(now_B11 >= 0, new, number).astype(jnp.float32)

        return tuple(map(one, statistics, numbers))

    @jax.named_scope("review")
    def _review(self, statistic: Statistic, entry: Entry, now_B11, single: int) -> tuple["LayerCache", Entry]:
        """Reckon a statistic's numbers anew where it is time, from all that a head holds and is offered.

        `single` is how many tokens of each row come that came one by one; 0: a prompt's do, for which it is always time.
        """
        kept = [self.cascade.numbers(index) for index in range(len(self.slots))]
        place, period = self.cascade.statistics.index(statistic), statistic.period(self.kept)
        due_B11 = (now_B11 >= 0) & ((now_B11 // period != (now_B11 - single) // period) | (not single))
        numbers = [
            slots.numbers[names.index(statistic)]
            if statistic in names
            else jnp.full_like(slots.pos_BKS, jnp.nan, jnp.float32)
            for slots, names in zip(self.slots, kept, strict=True)
        ]
        numbers.append(entry.numbers[place])

        def anew(numbers, cache, entry, now_B11):
            join = lambda parts: jnp.concatenate(parts, 2)
            k, v = (join([*each]) for each in zip(*cache._vectors(self.bases), (entry.k, entry.v), strict=True))
            pos = join([*(slots.pos_BKS for slots in cache.slots), entry.pos_BKT])
            tokens = Tokens(pos, k, v, now_B11, cache._memories(statistic), cache._here)
            new = statistic.review(join(numbers), tokens)
            return jnp.split(new, [sum(x.shape[2] for x in numbers[: i + 1]) for i in range(len(numbers) - 1)], 2)

        # But for the bases, which have no rows.
        arguments = lax.stop_gradient((numbers, dataclasses.replace(self, bases=()), entry, now_B11))

        def row(index, numbers):
            one = lambda tree: jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, index, 1), tree)
            put = lambda numbers: jax.tree.map(
                lambda x, new: lax.dynamic_update_slice_in_dim(x, new, index, 0), numbers, anew(*one(arguments))
            )
            return lax.cond(due_B11[index, 0, 0], put, lambda numbers: numbers, numbers)

        # A step reviews the rows that are due, one after the other: the others pay nothing, and what is reckoned with is small.
        if single:
            rows = lambda numbers: lax.fori_loop(0, len(now_B11), row, numbers)
            new = lax.cond(due_B11.any(), rows, lambda numbers: numbers, arguments[0])
        else:
            new = [jnp.where(due_B11, *each) for each in zip(anew(*arguments), arguments[0], strict=True)]
        put = lambda held, names, x: tuple(x if each == statistic else y for each, y in zip(names, held, strict=True))
        slots = (
            dataclasses.replace(slots, numbers=put(slots.numbers, names, x))
            for slots, names, x in zip(self.slots, kept, new[:-1], strict=True)
        )
        carried = put(entry.numbers, self.cascade.statistics, new[-1])
        return dataclasses.replace(self, slots=tuple(slots)), dataclasses.replace(entry, numbers=carried)

    def _take(self, q_BTNH, entry: Entry, positions_BT) -> "LayerCache":
        """Tier 0 takes the tokens in, its victims go to tier 1, and so on; what the last tier does not keep is forgotten.

        The newest token is never forgotten in its own call: the last tier cannot refuse it, if it has not waited.
        """
        now_B11 = positions_BT.max(-1)[:, None, None]
        promise(lambda: self._new(positions_BT), NOT_NEW)
        if isinstance(self.cascade.tiers[-1].policy, Full) and not self.heads.window:
            promise(lambda: (now_B11 < self.context).all(), f"a full cache for {self.context} tokens is given another")
        cache, single = self._remember(q_BTNH, positions_BT), positions_BT.shape[1] == 1
        first = 0 if single else self.cascade.front if self.prompting else 0
        if self.cascade.pending and not first:
            return cache._wait(entry, now_B11, single)
        return cache._enter(entry, now_B11, first, int(single))

    def _wait(self, entry: Entry, now_B11, single: bool) -> "LayerCache":
        """Tokens wait in the first tier, each in the slot of its position modulo their number, until one comes that does not belong to those
        that wait: these are then handed over together. Of many tokens at once those go with them that would have been handed over already."""
        count, waiting = self.cascade.pending, self.slots[0]
        begin_B11 = now_B11 // count * count  # of those that wait from now on
        over = lambda pos: (pos >= 0) & (pos < begin_B11)
        handed_BKS = over(waiting.pos_BKS)
        closed = dataclasses.replace(waiting, pos_BKS=jnp.where(handed_BKS, -1, waiting.pos_BKS))
        cache = dataclasses.replace(self, slots=(closed, *self.slots[1:]))

        def hand_over(slots: tuple[Slots, ...]) -> tuple[Slots, ...]:
            k, v = self._vectors(self.bases)[0]
            handed = Entry(k, v, jnp.where(handed_BKS, waiting.pos_BKS, -1), waiting.numbers)
            if not single:
                gone = dataclasses.replace(entry, pos_BKT=jnp.where(over(entry.pos_BKT), entry.pos_BKT, -1))
                handed = jax.tree.map(lambda *parts: jnp.concatenate(parts, 2), handed, gone)
            newest_B11 = handed.pos_BKT.max((1, 2), keepdims=True)
            return dataclasses.replace(cache, slots=slots)._enter(handed, newest_B11, 1, count * single).slots

        if single:
            slots = lax.cond(handed_BKS.any(), hand_over, lambda slots: slots, cache.slots)
        else:
            slots = hand_over(cache.slots)
        # The slots of the tokens to come are the worst, in their order, and those tokens the best.
        place_BKT = jnp.where((entry.pos_BKT >= 0) & ~over(entry.pos_BKT), entry.pos_BKT - begin_B11, count)
        index_S, rank_BKT = jnp.arange(count), jnp.where(place_BKT < count, count - place_BKT, -jnp.inf)
        there_BKS = (index_S >= place_BKT.min(-1, keepdims=True)) & (index_S <= now_B11 - begin_B11)
        rank_BKS = jnp.where(there_BKS, index_S - count, 2 * count)
        ranks = jnp.concatenate([rank_BKS, rank_BKT], -1).astype(jnp.float32)
        bases = self.bases[0] if self.bases else None
        written, _ = exchange(
            slots[0], bases.into(entry) if bases else entry, ranks, self.cascade.tiers[0].codecs, True
        )
        return dataclasses.replace(cache, slots=(written, *slots[1:]))

    def _enter(self, entry: Entry, now_B11, first: int, single: int) -> "LayerCache":
        """Offer tokens to the tiers from the `first` on, their numbers reviewed if it is time; `single` as of `_review`."""
        cache = self
        for statistic in self.cascade.statistics:
            if statistic.reviews:
                cache, entry = cache._review(statistic, entry, now_B11, single)
        return cache._sink(entry, now_B11, first)

    def _sink(self, entry: Entry, now_B11, first: int) -> "LayerCache":
        """Offer tokens to the tiers from the `first` on."""
        cache, statistics, held, window = self, self.cascade.statistics, [*self.slots[:first]], self.heads.window
        for index, tier in enumerate(self.cascade.tiers[first:], first):
            slots = cache.slots[index]
            kept, carried = self.cascade.numbers(index), dict(zip(statistics, entry.numbers, strict=True))
            offered = dataclasses.replace(entry, numbers=tuple(carried[each] for each in kept))
            last = index == len(self.slots) - 1
            bases = self.bases[index] if self.bases else None
            newest = not self.cascade.pending
            slots, left = take_in(tier, slots, offered, kept, cache._memory, now_B11, window, last, newest, bases)
            held.append(slots)
            if left is not None:
                # Where a tier does not keep a number, nothing leaves it: those left over are the tokens that were offered.
                carried |= dict(zip(kept, left.numbers, strict=True))
                entry = dataclasses.replace(left, numbers=tuple(carried[each] for each in statistics))
        return dataclasses.replace(cache, slots=tuple(held))

    def answering(self) -> "LayerCache":
        """The same cache when its prompt is over: from now on all tokens enter the first tier."""
        return dataclasses.replace(self, prompting=False)

    def settled(self) -> "LayerCache":
        """The same cache when a turn is over: what the tiers in front hold goes to the others, and the next prompt goes past them."""
        front = self.cascade.front
        if not front:
            return self
        now_B11 = jnp.stack([slots.pos_BKS.max((1, 2)) for slots in self.slots]).max(0)[:, None, None]
        cache = dataclasses.replace(self, prompting=True)
        # The lowest first: it holds what is oldest. A tier's tokens are offered in the order of their positions.
        for index in reversed(range(front)):
            slots, kept = cache.slots[index], self.cascade.numbers(index)
            order = jnp.argsort(jnp.where(slots.pos_BKS < 0, jnp.iinfo(jnp.int32).max, slots.pos_BKS), 2)
            take = lambda x, order=order: jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 3)), 2)
            carried = dict(zip(kept, map(take, slots.numbers), strict=True))
            none = jnp.zeros(slots.pos_BKS.shape, jnp.float32)
            numbers = tuple(carried.get(each, none) for each in self.cascade.statistics)
            k, v = map(take, cache._vectors(self.bases)[index])
            entry = Entry(k, v, take(slots.pos_BKS), numbers)
            gone = dataclasses.replace(slots, pos_BKS=jnp.full_like(slots.pos_BKS, -1))
            cache = dataclasses.replace(cache, slots=(*cache.slots[:index], gone, *cache.slots[index + 1 :]))
            cache = cache._sink(entry, now_B11, front)
        return cache

    def hinted(self, rows: Sequence[Sequence[Hint]]) -> "LayerCache":
        """The same cache with these hints of each row, where a tier reads them."""
        pairs = zip(self.cascade.memories, self.memories, strict=True)
        memories = (each.filled(held, rows) if isinstance(each, Hints) else held for each, held in pairs)
        return dataclasses.replace(self, memories=tuple(memories))

    def _new(self, positions_BT) -> Bool[Array, ""]:
        """Whether each row's positions are higher than what it holds, and none is there twice."""
        newest_B1 = jnp.stack([slots.pos_BKS.max((1, 2)) for slots in self.slots]).max(0)[:, None]
        ordered_BT = jnp.sort(positions_BT)
        twice = (ordered_BT[:, 1:] == ordered_BT[:, :-1]) & (ordered_BT[:, 1:] >= 0)
        return ((positions_BT < 0) | (positions_BT > newest_B1)).all() & ~twice.any()

    def _remember(self, q_BTNH, positions_BT) -> "LayerCache":
        update = lambda each, memory: each.update(memory, lax.stop_gradient(q_BTNH), positions_BT, self._here)
        return dataclasses.replace(self, memories=tuple(map(update, self.cascade.memories, self.memories)))


type Beside = Callable[[list[Held], bool], tuple[Partial, list[Weights]]]
"""Attention of a call's queries to slots that it is given and to what else they see: the partial and, if it is wanted, those slots' weights."""

NOT_EMPTY = "a prompt is put into a cache that is not empty"
NOT_FROM_ZERO = "a prompt's positions are not 0, 1, 2, … with padding after them"
NOT_NEW = "a row's positions must be new, and higher than those that it had before"


def _counted(mass_BKQS, positions_BQ, last: int):
    """The mass of the queries that count: of those that are there, all or the `last` so many positions."""
    counts_BQ = positions_BQ >= 0
    if last:
        counts_BQ &= positions_BQ > positions_BQ.max(-1, keepdims=True) - last
    if positions_BQ.shape[1] == 1:
        return mass_BKQS[:, :, 0]  # padding gives nothing
    return jnp.where(counts_BQ[:, None, :, None], mass_BKQS, 0).sum(2)
