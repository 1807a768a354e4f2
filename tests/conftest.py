"""Eight simulated CPU devices, a compilation cache and a quiet libtpu, set before jax is first imported."""

import gc
import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the suite's time is compilation. Without LLVM's optimizations, and with XLA's older emitters (jax 0.10 has
# them; newer versions ignore the option), it takes less than half. A program in one piece instead of 32 that are
# compiled side by side is another tenth less: the processors are busy with other workers anyway.
_FLAGS = {
    "--xla_force_host_platform_device_count": 8,
    "--xla_backend_optimization_level": 0,
    "--xla_backend_extra_options": "xla_cpu_disable_new_fusion_emitters=true",
    "--xla_cpu_parallel_codegen_split_count": 1,
}
for _flag, _value in _FLAGS.items():
    if _flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}={_value}".strip()
# libtpu only compiles here: it must not look for a device or ask the network for one, nor mind a second process
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
os.environ["TPU_ACCELERATOR_TYPE"] = "v5litepod-4"
os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

from moe_zoo.models import decoder  # noqa: E402

# Layers are scanned one by one instead of four at a time: most tiny models have two, and their programs become smaller.
# Where the program itself is tested, the fixture below puts back what users get.
UNROLL, decoder._UNROLL = decoder._UNROLL, 1

# jax's own modules are never garbage, and tracing makes many objects: fewer, shorter collections
gc.freeze()
gc.set_threshold(20_000, 20, 20)

# The workers take file by file: the longest ones first, or one worker would still be in one when all else is done.
_LONGEST = ("train/test_mesh.py", "routing/test_contract.py", "train/test_configs.py", "train/test_distributed.py",
            "train/test_resume.py", "notebooks/test_notebooks.py")  # fmt: skip


def pytest_collection_modifyitems(items):
    places = {Path(__file__).parent / name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


# every compiled program lies in mappings of its own, of which a process may have 65,530: then compiling aborts
_MAPPINGS = 20_000


@pytest.fixture(scope="module")
def unrolled():
    """Layers are unrolled as outside of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "_UNROLL", UNROLL)
        yield


@pytest.fixture(scope="module", autouse=True)
def _few_mappings():
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > _MAPPINGS:
        jax.clear_caches()
        gc.collect()
