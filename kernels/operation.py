"""An operation as JAX's transformations see it: mapped by `jax.vmap`, differentiated, divided among devices."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import ArrayMapping, CompoundFactor, SdyShardingRule, custom_partitioning
from jax.experimental.hijax import HiPrim, Zero, instantiate_zeros, linearize_from_jvp, vmap_rule
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def apply(
    reference: Callable, calls: Mapping[str, Callable], arguments: Sequence, axes: str, gradient: Callable | None
) -> Any:
    """The results of the call for the platform that a program is compiled for, else of the one for `default`, else of the reference.

    The other arguments are as for `backend.run`.
    """
    leaves, tree = jax.tree.flatten(arguments)
    leaves = _varying(leaves, leaves)
    flat = functools.partial(Flat.of, tree)
    traced = evaluate.trace(flat(reference), *leaves)
    of_arguments, of_results = axes.split("->")
    program = Program(
        flat(reference),
        tuple((platform, flat(call)) for platform, call in calls.items()),
        _by_leaf(of_arguments.split(), tree),
        _by_leaf(of_results.split(), traced.out_tree),
        gradient and flat(gradient),
        traced.out_tree,
    )
    return traced.out_tree.unflatten(Operation(program, *leaves)(*leaves))


def _by_leaf(axes: Sequence[str], tree) -> tuple[str, ...]:
    """The axes of every array, from those of every item or of all alike."""
    if len(axes) < 2:
        return (*axes, "")[:1] * tree.num_leaves
    items = zip(axes, tree.children(), strict=True)
    return tuple(names for names, item in items for _ in range(item.num_leaves))


def _varying(arrays: Sequence[jax.Array], like: Sequence[jax.Array]) -> list[jax.Array]:
    """The arrays, said to vary along each axis of a `jax.shard_map` along which one of the others does."""
    along = lambda x: jax.typeof(x).mat.varying  # pyright: ignore
    axes = frozenset().union(*map(along, like))
    return [lax.pcast(x, tuple(sorted(axes - along(x))), to="varying") for x in arrays]


@functools.partial(jax.jit, static_argnums=0, inline=True)
def evaluate(function: Callable, *leaves):
    """Call a function that is traced once for all that are equal to it."""
    return function(*leaves)


@dataclasses.dataclass(frozen=True)
class Flat:
    """A function of an operation's arguments as one of the arrays in them; equal to another layer's if both do the same."""

    tree: Any
    function: Callable
    bound: tuple
    keywords: tuple

    @classmethod
    def of(cls, tree, function: Callable) -> "Flat":
        """Take a `functools.partial` apart, which is equal only to itself."""
        each = functools.partial(function)
        return cls(tree, each.func, each.args, tuple(each.keywords.items()))

    def __call__(self, *leaves, more: Sequence = ()):
        return self.function(*self.bound, *self.tree.unflatten(leaves), *more, **dict(self.keywords))


@dataclasses.dataclass(frozen=True)
class Program:
    """What an operation is compiled to: every device does its part of the arrays, as is best on its platform."""

    reference: Flat
    calls: tuple[tuple[str, Flat], ...]
    arguments: tuple[str, ...]
    """The names of the leading axes of every array, `_` for one without a name."""
    results: tuple[str, ...]
    gradient: Flat | None
    result_tree: Any

    def __call__(self, *leaves):
        # An interpreted kernel has effects, which `custom_partitioning` would lose.
        if "default" in dict(self.calls) or not any(map(str.isalpha, "".join(self.arguments))):
            return self.part(*leaves)
        divided = custom_partitioning(self.part)
        divided.def_partition(self.partition, sharding_rule=self.rule)
        return divided(*leaves)

    def part(self, *leaves):
        """The results on a platform, of whole arrays or a device's part of them."""
        on = lambda call: lambda *leaves: _varying(jax.tree.leaves(evaluate(call, *leaves)), leaves)
        calls = {platform: on(call) for platform, call in {"default": self.reference, **dict(self.calls)}.items()}
        return calls["default"](*leaves) if len(calls) == 1 else lax.platform_dependent(*leaves, **calls)

    def units(self, shapes: Sequence[Sequence[int]]) -> dict[str, int]:
        """Into how many equal parts an axis can be divided in all arrays: query heads into as many as KV heads."""
        found: dict[str, int] = {}
        for shape, names in zip(shapes, self.arguments + self.results, strict=True):
            for name, size in zip(names, shape, strict=False):
                found[name] = math.gcd(found.get(name, 0), size)
        return found

    def rule(self, mesh: Mesh, arguments: Sequence, results: Sequence) -> SdyShardingRule:
        """Which axes are divided alike, for the propagation of shardings from array to array."""
        shapes = [each.shape for each in (*arguments, *results)]
        units, sizes, mappings = self.units(shapes), {}, []
        for index, (shape, names) in enumerate(zip(shapes, self.arguments + self.results, strict=True)):
            factors: list[Any] = [f"own{index}x{axis}" for axis in range(len(shape))]
            for axis, (name, size) in enumerate(zip(names, shape, strict=False)):
                if name.isalpha() and size == units[name]:
                    factors[axis] = name
                elif name.isalpha():
                    sizes |= {name: units[name], factors[axis]: size // units[name]}
                    factors[axis] = CompoundFactor(name, factors[axis])
            mappings.append(ArrayMapping(*factors))
        # The rule takes the size of what is a whole axis somewhere from there, and refuses to be told.
        sizes = {factor: size for factor, size in sizes.items() if not any(factor in each for each in mappings)}
        return SdyShardingRule(tuple(mappings[: len(arguments)]), tuple(mappings[len(arguments) :]), **sizes)

    def partition(self, mesh: Mesh, arguments: Sequence, results: Sequence):
        """Divide each named axis as it is in the largest array that is divided along it, and no other, where the parts are equal."""
        shapes, names = [*arguments, *results], self.arguments + self.results
        units, divided, taken = self.units([x.shape for x in shapes]), {}, set()
        for x, axes in sorted(zip(shapes, names, strict=True), key=lambda each: -math.prod(each[0].shape)):
            for name, along in zip(axes, x.sharding.spec, strict=False):
                along = (along,) if isinstance(along, str) else along or ()
                parts = math.prod(mesh.shape[axis] for axis in along)
                if (
                    along
                    and name.isalpha()
                    and name not in divided
                    and not taken & {*along}
                    and units[name] % parts == 0
                ):
                    divided[name] = along
                    taken |= {*along}
        shardings = [
            NamedSharding(mesh, PartitionSpec(*map(divided.get, axes[: len(x.shape)])))
            for x, axes in zip(shapes, names, strict=True)
        ]
        return mesh, self.part, shardings[len(arguments) :], tuple(shardings[: len(arguments)])


class Operation(HiPrim):
    """A program, and its rules for JAX's transformations."""

    program: Program

    def __init__(self, program: Program, *leaves):
        self.in_avals = tuple(map(jax.typeof, leaves))
        self.out_aval = evaluate.trace(program.reference, *leaves).jaxpr.out_avals
        self.params = {"program": program}
        super().__init__()

    def expand(self, *leaves):
        """Where nothing transforms it any more; outside `jax.jit` it is compiled by itself."""
        return evaluate(self.program, *leaves)

    def batch(self, axis_data, args, dims):
        """Fold the new axis into the first that has a name; the reference's rule where an array has the new one alone."""
        size, names, first = axis_data.size, self.program.arguments, self.program.arguments[0][:1]
        if all(dim is None for dim in dims):
            return self(*args), [None] * len(self.out_aval)
        if not first.isalpha() or any(
            dim is not None and not axes.startswith(first) for dim, axes in zip(dims, names, strict=True)
        ):
            return vmap_rule(axis_data, self.reference, dims, 0)(*args), [0] * len(self.out_aval)

        def fold(x, dim):
            x = jnp.broadcast_to(x, (size, *x.shape)) if dim is None else jnp.moveaxis(x, dim, 0)
            return x.reshape(size * x.shape[1], *x.shape[2:])

        folded = [fold(x, dim) if axes.startswith(first) else x for x, dim, axes in zip(args, dims, names, strict=True)]
        results = Operation(self.program, *folded)(*folded)
        return [x.reshape(size, x.shape[0] // size, *x.shape[1:]) for x in results], [0] * len(results)

    def jvp(self, primals, tangents):
        """The reference's derivative, along those tangents that are not zero."""
        moving = [index for index, tangent in enumerate(tangents) if not isinstance(tangent, Zero)]

        def reference(*some):
            leaves = dict(enumerate(primals)) | dict(zip(moving, some, strict=True))
            return self.reference(*leaves.values())

        _, found = jax.jvp(reference, [primals[i] for i in moving], [tangents[i] for i in moving])
        still = [
            None if jnp.issubdtype(aval.dtype, jnp.inexact) else Zero(aval.to_tangent_aval()) for aval in self.out_aval
        ]
        return self(*primals), [zero or x for zero, x in zip(still, found, strict=True)]

    lin, linearized = linearize_from_jvp

    def vjp_fwd(self, nzs_in, *leaves):
        """Nothing is kept but the arguments."""
        return self(*leaves), leaves

    def vjp_bwd_retval(self, res, outgrad):
        """By the operation's own gradient, else by the reference's."""
        cotangents, gradient = [instantiate_zeros(x) for x in outgrad], self.program.gradient
        if gradient is None:
            return jax.vjp(self.reference, *res)[1](cotangents)
        found = gradient(*res, more=[self.program.result_tree.unflatten(cotangents)])
        return tuple(gradient.tree.flatten_up_to(found))

    def reference(self, *leaves):
        """The reference's results."""
        return jax.tree.leaves(evaluate(self.program.reference, *leaves))
