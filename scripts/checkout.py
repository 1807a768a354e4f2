"""For `authors.py`: single definitions out of git checkouts, run beside stubs, and how far two arrays are apart."""

import __future__

import abc
import ast
import contextlib
import math
import os
import pathlib
import subprocess
import sys
import types
from types import SimpleNamespace as Space
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np

try:
    import torch
except ImportError:
    torch = None


class Missing(Exception):
    """A checkout, a package or a definition that is not there."""


class Checkout:
    """A git checkout: which commit, and single definitions out of it."""

    def __init__(self, directory: pathlib.Path, repo: str):
        owner, name = repo.split("/")
        found = [p for p in (directory / f"{owner}+{name}", directory / repo, directory / name) if p.is_dir()]
        if not found:
            raise Missing(f"no checkout of {repo} in {directory}")
        self.repo, self.path = repo, found[0]
        self.commit = self._git("rev-parse", "HEAD").strip()

    def _git(self, *command: str) -> str:
        done = subprocess.run(["git", "-C", str(self.path), *command], capture_output=True, text=True)
        if done.returncode:
            raise Missing(f"{self.repo}: git {' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def run(self, path: str, *names: str, at: str = "HEAD", **surroundings) -> types.ModuleType:
        """A module with the definitions `names` of a file, as it was `at` a commit; a name may also be the condition of
        an `if` to execute.
        """
        tree, body = ast.parse(self._git("show", f"{at}:{path}")), []
        for name in names:
            found = [n for n in tree.body if getattr(n, "name", None) == name]
            found += [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == name]
            if not found:
                raise Missing(f"{self.repo} {path} has no {name}")
            body.append(found[0])
        module = types.ModuleType(f"{self.repo}/{path}")
        sys.modules[module.__name__] = module  # dataclasses look their module up
        common = dict(torch=torch, nn=torch and torch.nn, F=torch and torch.nn.functional, jax=jax, jnp=jnp, np=np)
        module.__dict__.update({**common, "math": math, "flax": flax, "abc": abc, "os": os, **surroundings})
        keep = __future__.annotations.compiler_flag  # annotations may name what is not here
        exec(compile(ast.Module(body, []), f"{self.repo}/{path}", "exec", keep, dont_inherit=True), module.__dict__)
        return module


def tensor(array, **options):
    """A float32 torch copy."""
    return torch.tensor(np.asarray(array, np.float32), **options)


def numpy(array) -> np.ndarray:
    """A numpy array of either side's."""
    return np.asarray(array.detach() if torch and torch.is_tensor(array) else array)


def lenient(**changes):
    """torch.nn whose Module takes and ignores what some authors hand to it."""
    start = lambda self, *args, **kwargs: torch.nn.Module.__init__(self)
    return Space(**{**vars(torch.nn), "Module": type("Module", (torch.nn.Module,), {"__init__": start}), **changes})


class Config(Space):
    """Settings; what is not set is None."""

    def __getattr__(self, name):
        return None


class Idle(Space):
    """Stands for what does not matter here: any function of it does nothing."""

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


class Static(np.ndarray):
    """An array that knows its shape by TensorFlow 1's method."""

    def get_shape(self):
        return Space(as_list=lambda: list(self.shape))


def tensorflow(**changes) -> Space:
    """As much of TensorFlow 1 as routing code asks for, in jnp: its names, its order of arguments."""
    function = dict(
        zeros_initializer=lambda: None, variable_scope=lambda *a, **k: contextlib.nullcontext(), float32=jnp.float32,
        nn=Space(softplus=jax.nn.softplus, softmax=jax.nn.softmax), matmul=jnp.matmul, square=jnp.square,
        to_float=lambda x: jnp.asarray(x, jnp.float32), to_int32=lambda x: jnp.asarray(x, jnp.int32), where=jnp.where,
        shape=lambda x: x.shape, size=jnp.size, unstack=lambda x, num: list(x), reshape=jnp.reshape, stack=jnp.stack,
        range=jnp.arange, div=jnp.floor_divide, expand_dims=jnp.expand_dims, gather=lambda x, at: x[at],
        greater=jnp.greater, erf=jax.scipy.special.erf, argmax=jnp.argmax, reduce_max=jnp.max, reduce_sum=jnp.sum,
        squared_difference=lambda a, b: (a - b) ** 2, one_hot=lambda at, n, on: on * jax.nn.one_hot(at, n),
        slice=lambda x, begin, size: x[:, begin[1] : begin[1] + size[1]],
        unsorted_segment_sum=lambda x, at, n: jax.ops.segment_sum(x, at, num_segments=n),
    )  # fmt: skip
    return Space(**{**function, **changes})


class Dimension(NamedTuple):
    """A named axis of Mesh TensorFlow."""

    name: str
    size: int


class Named:
    """An array whose axes have names, and arithmetic that matches axes by them."""

    def __init__(self, value, dims):
        self.value, self.dims, self.mesh = value, tuple(dims), None
        self.shape, self.dtype = Space(dims=self.dims), value.dtype

    def spread(self, dims):
        """The values with axes in the order of `dims`, 1 where there is none."""
        mine = [d for d in dims if d in self.dims]
        value = jnp.transpose(self.value, [self.dims.index(d) for d in mine])
        return value.reshape([d.size if d in self.dims else 1 for d in dims])

    def with_(self, function, other):
        if not isinstance(other, Named):
            return Named(function(self.value, other), self.dims)
        dims = self.dims + tuple(d for d in other.dims if d not in self.dims)
        return Named(function(self.spread(dims), other.spread(dims)), dims)

    def reduced(self, function, dim=None):
        dims = self.dims if dim is None else (dim,)
        value = function(self.value, axis=tuple(self.dims.index(d) for d in dims))
        return Named(value, [d for d in self.dims if d not in dims])

    __add__ = __radd__ = lambda self, other: self.with_(jnp.add, other)
    __mul__ = __rmul__ = lambda self, other: self.with_(jnp.multiply, other)
    __truediv__ = lambda self, other: self.with_(jnp.divide, other)
    __rsub__ = lambda self, other: self.with_(lambda a, b: b - a, other)


def mesh_tensorflow(**changes) -> Space:
    """As much of Mesh TensorFlow as top-2 gating asks for."""
    cast = lambda x, dtype=jnp.float32: Named(x.value.astype(dtype), x.dims)

    def cumsum(x, dim, exclusive):
        total = jnp.cumsum(x.value, axis=x.dims.index(dim))
        return Named(total - x.value if exclusive else total, x.dims)

    function = dict(
        softmax=lambda x, dim: Named(jax.nn.softmax(x.value, x.dims.index(dim)), x.dims), to_float=cast, cast=cast,
        top_1=lambda x, dim: (x.reduced(jnp.max, dim), x.reduced(lambda v, axis: v.argmax(*axis), dim)),
        one_hot=lambda x, dim, dtype=jnp.float32: Named(jax.nn.one_hot(x.value, dim.size, dtype=dtype), (*x.dims, dim)),
        equal=lambda a, b: a.with_(jnp.equal, b), less=lambda a, b: a.with_(jnp.less, b), cumsum=cumsum,
        reduce_mean=lambda x, reduced_dim=None: x.reduced(jnp.mean, reduced_dim),
        reduce_sum=lambda x, reduced_dim=None: x.reduced(jnp.sum, reduced_dim),
        greater=lambda a, b: a.with_(jnp.greater, b), to_int32=lambda x: cast(x, jnp.int32),
    )  # fmt: skip
    return Space(**{**function, **changes})


class UnitVectors(list):
    """Instead of a list of experts: number e answers with the e-th unit vector, so that the output is the gates."""

    def __getitem__(self, e):
        return lambda x_RD: torch.eye(x_RD.shape[1])[e].expand(x_RD.shape)


def difference(ours, theirs) -> float:
    """The largest absolute difference."""
    a, b = numpy(ours).astype(np.float64), numpy(theirs).astype(np.float64)
    if a.shape != b.shape or not b.any():
        raise ValueError(f"nothing to compare: shapes {a.shape} and {b.shape}, theirs non-zero: {b.any()}")
    return float(np.abs(a - b).max())


def gates(ours_TE, theirs_TE, name: str = "") -> dict[str, float]:
    """Differences of two gate matrices, and of which of their entries are set."""
    chosen = ((numpy(ours_TE) != 0) != (numpy(theirs_TE) != 0)).sum()
    return {f"{name}choices": int(chosen), f"{name}gates": difference(ours_TE, theirs_TE)}
