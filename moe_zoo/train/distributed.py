"""Several processes that train as one, each with its own devices. In one process all of this is a plain call.

Every process runs the same program in the same order. Process 0, the main one, alone reads the data and writes files
and the console; arrays travel as collectives of the devices, words through jax's coordination service.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from moe_zoo.core.registry import ConfigError
from moe_zoo.data import Corpus
from moe_zoo.train.config import differences

T = TypeVar("T")

_DAY_MS = 24 * 3600 * 1000  # who waits for words waits as long as the others live: moe_zoo.train.peers sees to that
_CHUNK = 1 << 24  # bytes of a broadcast at a time
_calls = itertools.count()


class PeerError(RuntimeError):
    """Another process failed; the message is one line and says which, and how."""


def is_main() -> bool:
    """Whether this process reads, writes and speaks for all."""
    return jax.process_index() == 0


def client():
    """The coordination service, None in a run of one process."""
    from jax._src import distributed  # there is no public way to the service that jax.distributed starts

    return distributed.global_state.client


def tell(value: Any) -> Any:
    """Process 0's `value`, which JSON can hold, in every process."""
    if jax.process_count() == 1:
        return value
    key = f"moe_zoo/told/{next(_calls)}"
    if is_main():
        client().key_value_set(key, json.dumps(value))
        return value
    return json.loads(client().blocking_key_value_get(key, _DAY_MS))


def main_only(work: Callable[[], T]) -> T | None:
    """Calls `work` in process 0 alone: what it returns there, None elsewhere. When it fails, all processes do."""
    if jax.process_count() == 1:
        return work()
    result = failure = None
    if is_main():
        try:
            result = work()
        except Exception as error:
            failure = error
    told = tell(None if failure is None else one_line(failure))
    if failure is not None:
        raise failure
    if told is not None:
        raise PeerError(f"process 0: {told}")
    return result


def same_settings(settings: Mapping[str, Any]) -> None:
    """Raises ConfigError in a process whose settings are not process 0's."""
    mine = json.loads(json.dumps(settings))
    if changed := differences(tell(mine), mine):
        raise ConfigError(f"process {jax.process_index()} has other settings than process 0 ({'; '.join(changed[:4])})")


def load_once(load: Callable[[], Corpus]) -> Corpus:
    """The corpus that process 0 loads: read, unpacked and tokenized once, then sent to the others."""
    corpus = main_only(load)
    if jax.process_count() == 1:
        return corpus
    names = [field.name for field in dataclasses.fields(Corpus)]
    fields = {name: getattr(corpus, name) for name in names} if is_main() else {}
    arrays = broadcast({name: value for name, value in fields.items() if isinstance(value, np.ndarray)})
    rest = tell({name: value for name, value in fields.items() if not isinstance(value, np.ndarray)})
    return Corpus(**arrays, **rest | {"domains": tuple(rest["domains"])})


def broadcast(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Process 0's arrays in every process; what the others give is ignored."""
    if jax.process_count() == 1:
        return dict(arrays)
    kinds = tell({name: [array.dtype.str, array.shape] for name, array in arrays.items()})
    received = {}
    for name, (dtype, shape) in kinds.items():
        whole = np.empty(shape, dtype) if not is_main() else np.ascontiguousarray(arrays[name])
        flat = whole.reshape(-1).view(np.uint8)
        for begin in range(0, len(flat), _CHUNK):
            part = flat[begin : begin + _CHUNK]
            # rounded up, so that few sizes are compiled
            sent = np.zeros(min(_CHUNK, 1 << max(12, (len(part) - 1).bit_length())), np.uint8)
            sent[: len(part)] = part
            got = multihost_utils.broadcast_one_to_all(sent)
            if not is_main():
                part[:] = got[: len(part)]
        received[name] = whole
    return received


def put(value: Any, sharding: Sharding) -> jax.Array:
    """A host array that every process has, laid out: each places the shards of its own devices. No alias."""
    if sharding.is_fully_addressable:
        return jax.device_put(value, sharding, may_alias=False)
    value = np.asarray(value)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: np.array(value[index]))


def rows_here(sharding: NamedSharding, batch_size: int, path: str) -> np.ndarray | None:
    """Which rows of a batch the devices of this process hold, sorted; None: all. Raises ConfigError, naming `path`."""
    axes = sharding.spec[0]
    parts = math.prod(sharding.mesh.shape[axis] for axis in axes)
    if batch_size % parts:
        raise ConfigError(f"{path}: {batch_size} does not divide over mesh axes {axes} of size {parts}")
    if sharding.is_fully_addressable:
        return None
    held = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in held]))


def put_batch(batch: Mapping[str, np.ndarray], sharding: Sharding, batch_size: int) -> dict[str, jax.Array]:
    """A batch on the devices; `batch` has the rows of `rows_here`."""
    if sharding.is_fully_addressable:
        return jax.device_put(batch, sharding)
    whole = lambda x: jax.make_array_from_process_local_data(sharding, x, (batch_size, *x.shape[1:]))
    return {name: whole(x) for name, x in batch.items()}


class Agreement:
    """What every process takes to be so: whether one of them is to stop, and process 0's seconds of training.

    `signal.asked` and `watch.seconds` of one process, at once. Of several, as they were before the last step: they
    travel in a small collective of their own, started after a step and read after the next one, so that nothing waits.
    """

    def __init__(self, mesh: Mesh, signal, watch):
        self._signal, self._watch, self._alone = signal, watch, jax.process_count() == 1
        self._agreed, self._underway = (0.0, watch.seconds), None
        self._spread = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._most = jax.jit(lambda x: jnp.max(x, axis=0), out_shardings=NamedSharding(mesh, PartitionSpec()))

    @property
    def stop(self) -> bool:
        """The same in every process."""
        return self._signal.asked if self._alone else self._agreed[0] > 0

    @property
    def seconds(self) -> float:
        """The same in every process."""
        return self._watch.seconds if self._alone else self._agreed[1]

    def after_step(self) -> None:
        """Once after each step."""
        if self._alone:
            return
        mine = np.array([[self._signal.asked, self._watch.seconds if is_main() else 0]], np.float32)
        shape = (self._spread.num_devices, 2)
        started = self._most(jax.make_array_from_callback(shape, self._spread, lambda _: mine))
        if self._underway is not None:
            self._agreed = tuple(np.asarray(self._underway).tolist())
        self._underway = started


def one_line(error: BaseException) -> str:
    """What an error says; with its type, if it is not one of ours that speak for themselves."""
    text = " ".join(str(error).split())
    return text if isinstance(error, (ValueError, RuntimeError)) and text else f"{type(error).__name__}: {text}"
